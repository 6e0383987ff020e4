"""KV-cache compression for transformers language models: press, answer, measure.

Names are loaded when they are first used, so that what needs no model answers at once.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from cachepress._pipelines import register_when_loaded

if TYPE_CHECKING:
    from cachepress.cache.batch import CacheSize as CacheSize
    from cachepress.cache.batch import fork as fork
    from cachepress.cache.batch import size_of as size_of
    from cachepress.cache.codec import Codec as Codec
    from cachepress.errors import CachepressError as CachepressError
    from cachepress.errors import ForeignAttentionError as ForeignAttentionError
    from cachepress.errors import UnsupportedError as UnsupportedError
    from cachepress.generation.ask import ask as ask
    from cachepress.generation.cache_files import load_cache as load_cache
    from cachepress.generation.cache_files import save_cache as save_cache
    from cachepress.generation.decode import decode as decode
    from cachepress.generation.pipeline import (
        KVPressTextGenerationPipeline as KVPressTextGenerationPipeline,
    )
    from cachepress.generation.prefill import prefill as prefill
    from cachepress.hf import detach as detach
    from cachepress.presses import *  # noqa: F403
    from cachepress.settings import configure as configure
    from cachepress.spec import SpecError as SpecError
    from cachepress.spec import parse as parse
    from cachepress.view import LayerView as LayerView
    from cachepress.view import Needs as Needs

__version__ = "0.2.0"
_HOMES = {
    "CacheSize": "cache.batch",
    "CachepressError": "errors",
    "Codec": "cache.codec",
    "ForeignAttentionError": "errors",
    "KVPressTextGenerationPipeline": "generation.pipeline",
    "LayerView": "view",
    "Needs": "view",
    "SpecError": "spec",
    "UnsupportedError": "errors",
    "ask": "generation.ask",
    "configure": "settings",
    "decode": "generation.decode",
    "detach": "hf",
    "fork": "cache.batch",
    "load_cache": "generation.cache_files",
    "parse": "spec",
    "prefill": "generation.prefill",
    "save_cache": "generation.cache_files",
    "size_of": "cache.batch",
}
"""The module of each public name that is no press; no name may be that of a module itself."""


def _load(name: str) -> object:
    """Import a public name when it is first used, and remember it."""
    if name == "__all__":
        value: object = [*_HOMES, *import_module("cachepress.presses").__all__]
    elif name in _HOMES:
        value = getattr(import_module(f"cachepress.{_HOMES[name]}"), name)
    elif name.endswith("Press") and hasattr(presses := import_module("cachepress.presses"), name):
        value = getattr(presses, name)
    else:
        value = _module(name)
    setattr(sys.modules[__name__], name, value)
    return value


def _module(name: str) -> object:
    """Import a module of the package when it is first used as an attribute."""
    missing = f"module {__name__!r} has no attribute {name!r}"
    if name.startswith("_"):
        raise AttributeError(missing)
    try:
        return import_module(f"cachepress.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"cachepress.{name}":
            raise
        raise AttributeError(missing) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *sys.modules[__name__].__all__})


if not TYPE_CHECKING:  # Else no misspelt name could be told from a right one.
    __getattr__ = _load
register_when_loaded()
