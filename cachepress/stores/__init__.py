"""Stores: transformers cache layers that keep what was seen apart from what is held."""

from cachepress.stores.codec import STORAGES, Codec
from cachepress.stores.handle import RowsHandle
from cachepress.stores.held import Held
from cachepress.stores.store import Store

__all__ = ["STORAGES", "Codec", "Held", "RowsHandle", "Store"]
