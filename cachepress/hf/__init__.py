"""Wires presses into transformers models, by public interfaces alone.

transformers is touched in three places: an attention function registered under a name and selected
on one model (``attention.py``), the cache-layer protocol (``cachepress.cache.layer``), and the
forward that receives the cache (``session.py``). Rotary modules are watched besides while a prompt
is read in chunks, where frequencies depend on its length (``angles.py``). Importing this package
changes no model.
"""

from cachepress.hf.angles import as_one_forward
from cachepress.hf.blocks import unobserved
from cachepress.hf.probe import check_continues
from cachepress.hf.session import PressSession, codec_of
from cachepress.hf.shifts import SHIFT, check_shift, set_shift, shift_before, shift_of, use_shift
from cachepress.hf.wiring import (
    attach,
    cache_argument,
    check_model,
    detach,
    has_only_full_attention,
    install_layers,
    learned_positions,
    n_compressed_layers,
    sample_cache,
    text_decoder,
    trained_length,
)

__all__ = [
    "SHIFT",
    "PressSession",
    "as_one_forward",
    "attach",
    "cache_argument",
    "check_continues",
    "check_model",
    "check_shift",
    "codec_of",
    "detach",
    "has_only_full_attention",
    "install_layers",
    "learned_positions",
    "n_compressed_layers",
    "sample_cache",
    "set_shift",
    "shift_before",
    "shift_of",
    "text_decoder",
    "trained_length",
    "unobserved",
    "use_shift",
]
