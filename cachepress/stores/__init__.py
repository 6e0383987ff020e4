"""Stores: transformers cache layers that keep what was seen apart from what is held."""

from cachepress.stores.dense import DenseStore
from cachepress.stores.handle import RowsHandle

__all__ = ["DenseStore", "RowsHandle"]
