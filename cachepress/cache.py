"""What can be done with a compressed cache: copy it for a batch, and weigh it."""

import copy
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from cachepress.errors import CachepressError
from cachepress.stores import Store
from cachepress.stores.store import allocated_bytes


@dataclass(frozen=True)
class CacheSize:
    """What a cache saw and holds, over its compressed layers, measured from storage.

    Attributes:
        bytes_before: bytes allocated just before the last rows were dropped.
        bytes_after: bytes allocated now, slack and bookkeeping included.
        rows_seen: rows that an uncompressed cache would hold, padding included.
        rows_held: rows that are held.
    """

    bytes_before: int
    bytes_after: int
    rows_seen: int
    rows_held: int

    @property
    def ratio(self) -> float:
        """Fraction of rows that are gone."""
        return 1 - self.rows_held / self.rows_seen


def stores(cache: Cache) -> list[Store]:
    """The layers of a cache that cachepress holds."""
    return [layer for layer in cache.layers if isinstance(layer, Store)]


def size_of(cache: Cache) -> CacheSize:
    """Weigh a cache: its keys and values in every layer, compressed or not.

    Rows are counted in layers that keep the whole text; sliding windows bound themselves.

    Raises:
        CachepressError: if no layer holds rows.
    """
    before = rows_seen = rows_held = 0
    tensors: list[torch.Tensor] = []
    for layer in cache.layers:
        own = _tensors(layer)
        tensors += own
        earlier = layer.bytes_before if isinstance(layer, Store) else None
        before += allocated_bytes(own) if earlier is None else earlier
        seen, held = _rows(layer)
        rows_seen, rows_held = rows_seen + seen, rows_held + held
    if not rows_seen:
        raise CachepressError("the cache is empty: run a forward with it first")
    return CacheSize(before, allocated_bytes(tensors), rows_seen, rows_held)


def _tensors(layer: object) -> list[torch.Tensor]:
    """Keys and values of a layer; those of sliding windows, too."""
    if isinstance(layer, Store):
        return layer.tensors()
    found = (getattr(layer, name, None) for name in ("keys", "values"))
    return [x for x in found if x is not None]


def _rows(layer: object) -> tuple[int, int]:
    """Rows seen and held by a layer that keeps the whole text."""
    if isinstance(layer, Store):
        if not layer.is_initialized:
            return 0, 0
        lengths = layer.lengths
        return layer.get_seq_length() * lengths.numel(), int(lengths.sum())
    keys = getattr(layer, "keys", None)
    rows = 0 if keys is None or getattr(layer, "is_sliding", False) else keys.shape[:3].numel()
    return rows, rows


def fork(cache: Cache, n: int = 1) -> Cache:
    """A continuation of a cache that leaves the original untouched, ``n`` times as a batch.

    Compressed layers share their rows with the original: a fork costs what it appends. Layers with
    sliding windows or recurrent states are copied.

    Raises:
        CachepressError: if ``n`` is less than 1.
    """
    if n < 1:
        raise CachepressError(f"fork: got n={n}, wanted at least 1")
    copied = copy.deepcopy(cache)
    if n > 1:
        copied.reorder_cache(torch.zeros(n, dtype=torch.long))
    return copied
