"""Operations on a whole cache: fork it for a batch, measure its bytes, record its token ids."""

import copy
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from cachepress.cache.bytes import allocated_bytes
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.offloading import host_tensors
from cachepress.deprecated import Renamed
from cachepress.errors import CachepressError
from cachepress.limits import check_whole

TEXT = "text_ids"
"""The attribute of a layer that holds the token ids of the text."""


@dataclass(frozen=True)
class CacheSize:
    """Pairs and bytes of a cache: those held now, and those that an uncompressed cache would hold.

    Attributes:
        bytes_before: bytes of the keys and values that an uncompressed cache of the same text
            would hold, padding included: their shapes times the size of their dtype.
        bytes_after: bytes allocated now, slack and bookkeeping included.
        pairs_seen: key-value pairs that an uncompressed cache would hold, padding included.
        pairs_held: pairs that are held.
        bytes_offloaded: those of ``bytes_after`` that are in host memory, and come to the device
            layer by layer in a forward.
    """

    bytes_before: int
    bytes_after: int
    pairs_seen: int
    pairs_held: int
    bytes_offloaded: int = 0

    rows_seen = Renamed("pairs_seen")
    rows_held = Renamed("pairs_held")

    @property
    def ratio(self) -> float:
        """Fraction of pairs that are evicted."""
        return 1 - self.pairs_held / self.pairs_seen


def compressed_layers(cache: Cache) -> list[CompressedLayer]:
    """List the compressed layers of a cache."""
    return [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]


def sequences_of(cache: Cache) -> int:
    """Count the sequences that a cache holds."""
    if held := compressed_layers(cache):
        return held[0].batch_size
    found = (getattr(layer, "keys", None) for layer in cache.layers)
    return next((len(keys) for keys in found if isinstance(keys, Tensor)), 0)


def size_of(cache: Cache) -> CacheSize:
    """Measure a cache: its keys and values in every layer, compressed or not.

    Pairs are counted in layers that keep the whole text; sliding windows bound themselves.

    Raises:
        CachepressError: if no layer holds pairs.
    """
    before = pairs_seen = pairs_held = 0
    tensors: list[torch.Tensor] = []
    on_host: list[torch.Tensor] = []
    for layer in cache.layers:
        own = _tensors(layer)
        tensors, on_host = tensors + own, on_host + host_tensors(layer)
        before += (
            layer.whole_nbytes if isinstance(layer, CompressedLayer) else sum(x.nbytes for x in own)
        )
        seen, held = _pairs(layer)
        pairs_seen, pairs_held = pairs_seen + seen, pairs_held + held
    if not pairs_seen:
        raise CachepressError("the cache is empty: run a forward with it first")
    bytes_after, offloaded = allocated_bytes(tensors), allocated_bytes(on_host)
    return CacheSize(before, bytes_after, pairs_seen, pairs_held, offloaded)


def _tensors(layer: object) -> list[torch.Tensor]:
    """List the tensors of a layer, also of one with a sliding window."""
    if isinstance(layer, CompressedLayer):
        return layer.tensors()
    found = (getattr(layer, name, None) for name in ("keys", "values"))
    return [x for x in found if x is not None]


def _pairs(layer: object) -> tuple[int, int]:
    """Count the pairs seen and held by a layer with full attention."""
    if isinstance(layer, CompressedLayer):
        if not layer.is_initialized:
            return 0, 0
        lengths = layer.lengths
        return layer.get_seq_length() * lengths.numel(), int(lengths.sum())
    keys = getattr(layer, "keys", None)
    rows = 0 if keys is None or getattr(layer, "is_sliding", False) else keys.shape[:3].numel()
    return rows, rows


def note_text(cache: Cache, ids: Tensor, seen: int) -> None:
    """Record the token ids that a forward of one sequence wrote to the cache.

    Args:
        cache: the cache.
        ids: ``[1, n]`` the tokens.
        seen: text columns that were there before.
    """
    layer, known, new = _of_text(cache), _text(cache), ids.detach().cpu().numpy()
    if ids.shape[0] != 1:
        setattr(layer, TEXT, None)
    elif seen == 0:
        setattr(layer, TEXT, new.copy())
    elif known is not None and known.shape[1] == seen:
        setattr(layer, TEXT, np.concatenate([known, new], axis=1))


def text_of(cache: Cache) -> Tensor | None:
    """Return the token ids ``[1, n]`` of a cache's text or its beginning; None if not recorded."""
    known = _text(cache)
    return None if known is None else torch.from_numpy(known.copy())


def _text(cache: Cache) -> np.ndarray | None:
    known = getattr(_of_text(cache), TEXT, None) if cache.layers else None
    return None if known is None else known[:, : cache.get_seq_length()]


def _of_text(cache: Cache) -> object:
    """Find the layer that records the token ids of the cache's text."""
    return next(iter(compressed_layers(cache)), cache.layers[0])


def trim(cache: Cache) -> None:
    """Free the memory of tokens that sliding-window layers have evicted.

    After a prompt these are a view of all of its tokens, which would stay in memory, and be copied
    with the layer, until the next token comes.
    """
    for layer in cache.layers:
        if isinstance(layer, CompressedLayer) or not getattr(layer, "is_sliding", False):
            continue
        for name in ("keys", "values"):
            x = getattr(layer, name, None)
            if x is not None and not x.requires_grad and x.untyped_storage().nbytes() > x.nbytes:
                setattr(layer, name, x.clone())


def fork(cache: Cache, n: int = 1) -> Cache:
    """Fork a cache into a batch of ``n`` copies, to continue it without changing the original.

    Compressed layers share their pairs with the original: a fork costs what it appends. Layers with
    sliding windows or recurrent states are copied.

    Raises:
        CachepressError: if ``n`` is less than 1.
    """
    check_whole("fork: n", n)
    copied = copy.deepcopy(cache)
    if n > 1:
        copied.reorder_cache(cast(torch.LongTensor, torch.zeros(n, dtype=torch.long)))
    return copied


def ordinary(cache: Cache) -> Cache:
    """Copy an uncompressed cache into cache layers of transformers itself."""
    copied = copy.copy(cache)
    copied.layers = []
    for layer in cache.layers:
        if isinstance(layer, CompressedLayer):
            rows, plain = layer.snapshot.rows(), DynamicLayer()
            plain.update(rows.keys, rows.values)
        else:
            plain = copy.deepcopy(layer)
        copied.layers.append(plain)
    return copied
