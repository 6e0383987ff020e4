"""Models: where they come from, and what a tokenizer makes of a prompt."""

from cachepress.models.builtin import BUILTIN_MODELS, ModelError, describe
from cachepress.models.loading import load, load_tokenizer, resolve

__all__ = ["BUILTIN_MODELS", "ModelError", "describe", "load", "load_tokenizer", "resolve"]
