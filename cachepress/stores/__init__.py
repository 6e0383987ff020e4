"""Stores: transformers cache layers that keep what was seen apart from what is held."""

from cachepress.stores.handle import RowsHandle
from cachepress.stores.held import Held
from cachepress.stores.store import Store

__all__ = ["Held", "RowsHandle", "Store"]
