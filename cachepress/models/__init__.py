"""Loads models and tokenizers, built-in ones among them, and applies chat templates."""

from cachepress.models.builtin import BUILTIN_MODELS, ModelError, describe, remove
from cachepress.models.loading import load, load_tokenizer, resolve

__all__ = [
    "BUILTIN_MODELS",
    "ModelError",
    "describe",
    "load",
    "load_tokenizer",
    "remove",
    "resolve",
]
