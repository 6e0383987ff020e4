"""What can be done with a compressed cache: copy it for a batch, and weigh it."""

import copy
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from cachepress.errors import CachepressError
from cachepress.stores import DenseStore


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


def stores(cache: Cache) -> list[DenseStore]:
    """The layers of a cache that cachepress holds."""
    return [layer for layer in cache.layers if isinstance(layer, DenseStore)]


def size_of(cache: Cache) -> CacheSize:
    """Weigh a cache that was filled inside ``with press(model)``.

    Raises:
        CachepressError: if it has no filled layer of ours.
    """
    filled = [store for store in stores(cache) if store.is_initialized]
    if not filled:
        raise CachepressError("the cache was never filled inside `with press(model)`")
    return CacheSize(
        bytes_before=sum(s.settled.before if s.settled else s.nbytes for s in filled),
        bytes_after=sum(s.nbytes for s in filled),
        rows_seen=sum(s.get_seq_length() * s.lengths.numel() for s in filled),
        rows_held=sum(int(s.lengths.sum()) for s in filled),
    )


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
