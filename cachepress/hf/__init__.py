"""How transformers is wired: the only package that knows.

It is touched in three places: a named attention function selected on one model
(``attention.py``), the cache-layer protocol, and the forward that first receives the cache
(``observation.py``).
"""

from cachepress.hf.attention import attach, detach
from cachepress.hf.session import PressSession, codec_of
from cachepress.hf.wiring import (
    cache_argument,
    check_model,
    compressed_layers,
    has_only_full_attention,
    learned_positions,
    sample_cache,
)

__all__ = [
    "PressSession",
    "attach",
    "cache_argument",
    "check_model",
    "codec_of",
    "compressed_layers",
    "detach",
    "has_only_full_attention",
    "learned_positions",
    "sample_cache",
]
