"""The compressed cache: layers that hold some pairs of a text, and what can be done with them.

A ``CompressedLayer`` is a transformers cache layer. What was compressed is in immutable segments,
which forks share; what came since is in a tail. Which pairs stay is not decided here.
"""

from cachepress.cache.batch import CacheSize, fork, size_of
from cachepress.cache.codec import STORAGES, Codec
from cachepress.cache.handle import RowsHandle
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.snapshot import Snapshot

__all__ = [
    "STORAGES",
    "CacheSize",
    "Codec",
    "CompressedLayer",
    "RowsHandle",
    "Snapshot",
    "fork",
    "size_of",
]
