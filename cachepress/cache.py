"""What can be done with a compressed cache: copy it for a batch, and weigh it."""

import copy
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from cachepress.errors import CachepressError
from cachepress.stores import Store


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
    sizes = [size for layer in cache.layers if (size := _layer_size(layer)) is not None]
    total = CacheSize(*(sum(column) for column in zip(*sizes, strict=True)))
    if not sizes or not total.rows_seen:
        raise CachepressError("the cache is empty: run a forward with it first")
    return total


def _layer_size(layer: object) -> tuple[int, int, int, int] | None:
    if isinstance(layer, Store) and layer.is_initialized:
        before = layer.settled.before if layer.settled else layer.nbytes
        seen = layer.get_seq_length() * layer.lengths.numel()
        return before, layer.nbytes, seen, int(layer.lengths.sum())
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        return None
    nbytes = sum(x.untyped_storage().nbytes() for x in (keys, values))
    rows = 0 if getattr(layer, "is_sliding", False) else keys.shape[:3].numel()
    return nbytes, nbytes, rows, rows


def fork(cache: Cache, n: int = 1) -> Cache:
    """A copy of a cache of one sequence, ``n`` times as a batch; the original is not touched.

    Works for every kind of layer that transformers can reorder for beam search, sliding-window
    and linear-attention layers included.

    Raises:
        CachepressError: if ``n`` is less than 1.
    """
    if n < 1:
        raise CachepressError(f"fork: got n={n}, wanted at least 1")
    copied = copy.deepcopy(cache)
    if n > 1:
        copied.reorder_cache(torch.zeros(n, dtype=torch.long))
    return copied
