"""KV-cache compression for transformers language models: press, answer, measure."""

from cachepress.cache import CacheSize, fork, size_of
from cachepress.errors import CachepressError, ForeignAttentionError, UnsupportedError
from cachepress.hf import detach
from cachepress.persist import load_cache, save_cache
from cachepress.pipeline import KVPressTextGenerationPipeline
from cachepress.prefill import prefill
from cachepress.presses import *  # noqa: F403
from cachepress.presses import __all__ as _presses
from cachepress.spec import SpecError, parse
from cachepress.stores import Codec
from cachepress.view import LayerView, Needs

__version__ = "0.1.0"
__all__ = [
    "CacheSize",
    "CachepressError",
    "Codec",
    "ForeignAttentionError",
    "KVPressTextGenerationPipeline",
    "LayerView",
    "Needs",
    "SpecError",
    "UnsupportedError",
    "detach",
    "fork",
    "load_cache",
    "parse",
    "prefill",
    "save_cache",
    "size_of",
    *_presses,
]
