"""What can be done with a compressed cache: copy it for a batch, and weigh it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from cachepress.cache.layer import CompressedLayer, allocated_bytes
from cachepress.errors import CachepressError
from cachepress.limits import check_whole

TEXT = "text_ids"
"""The attribute of a layer that holds the token ids of the text."""


@dataclass(frozen=True)
class CacheSize:
    """What a cache saw and holds, over its compressed layers, measured from storage.

    Attributes:
        bytes_before: bytes of the keys and values that an uncompressed cache of the same text
            would hold, padding included: their shapes times the size of their dtype.
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


def stores(cache: Cache) -> list[CompressedLayer]:
    """The layers of a cache that cachepress holds."""
    return [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]


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
        before += (
            layer.whole_nbytes if isinstance(layer, CompressedLayer) else sum(x.nbytes for x in own)
        )
        seen, held = _rows(layer)
        rows_seen, rows_held = rows_seen + seen, rows_held + held
    if not rows_seen:
        raise CachepressError("the cache is empty: run a forward with it first")
    return CacheSize(before, allocated_bytes(tensors), rows_seen, rows_held)


def _tensors(layer: object) -> list[torch.Tensor]:
    """Keys and values of a layer; those of sliding windows, too."""
    if isinstance(layer, CompressedLayer):
        return layer.tensors()
    found = (getattr(layer, name, None) for name in ("keys", "values"))
    return [x for x in found if x is not None]


def _rows(layer: object) -> tuple[int, int]:
    """Rows seen and held by a layer that keeps the whole text."""
    if isinstance(layer, CompressedLayer):
        if not layer.is_initialized:
            return 0, 0
        lengths = layer.lengths
        return layer.get_seq_length() * lengths.numel(), int(lengths.sum())
    keys = getattr(layer, "keys", None)
    rows = 0 if keys is None or getattr(layer, "is_sliding", False) else keys.shape[:3].numel()
    return rows, rows


def note_text(cache: Cache, ids: Tensor, seen: int) -> None:
    """Note which tokens a forward of one sequence wrote.

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
    """Token ids ``[1, n]`` of the text in a cache, or of its beginning; None if none are known."""
    known = _text(cache)
    return None if known is None else torch.from_numpy(known.copy())


def _text(cache: Cache) -> np.ndarray | None:
    known = getattr(_of_text(cache), TEXT, None) if cache.layers else None
    return None if known is None else known[:, : cache.get_seq_length()]


def _of_text(cache: Cache) -> object:
    """The layer that knows the text."""
    return next(iter(stores(cache)), cache.layers[0])


def trim(cache: Cache) -> None:
    """Let layers with sliding windows hold their own tokens alone.

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
    """A continuation of a cache that leaves the original untouched, ``n`` times as a batch.

    Compressed layers share their rows with the original: a fork costs what it appends. Layers with
    sliding windows or recurrent states are copied.

    Raises:
        CachepressError: if ``n`` is less than 1.
    """
    check_whole("fork: n", n)
    copied = copy.deepcopy(cache)
    if n > 1:
        copied.reorder_cache(cast(torch.LongTensor, torch.zeros(n, dtype=torch.long)))
    return copied


def form_of(cache: Cache) -> tuple[object, ...] | None:
    """What caches have in common that can be one group of a batch; None if the cache cannot be.

    Only caches of one sequence without padding can, whose layers are all held by cachepress.
    """
    layers = stores(cache)
    if not layers or len(layers) != len(cache.layers) or layers[0].batch_size != 1:
        return None
    return None if layers[0].text_valid is not None else tuple(layer.form for layer in layers)


def join(groups: Sequence[Sequence[Cache]], n: int = 1) -> Cache:
    """Continuations of several caches as one batch, ``n`` of each.

    Group after group, and within a group all of its caches ``n`` times in a row. The rows of each
    cache are there once. A batch of several groups can be decoded from, and nothing else.

    Raises:
        CachepressError: if the caches of a group differ in form, see ``form_of``, or those of
            several groups saw texts of several lengths, or are stored in another way than as they
            came.
    """
    forms = [{form_of(cache) for cache in group} for group in groups]
    plain = all(is_plain(group[0]) for group in groups)
    seen = sorted({cache.get_seq_length() for group in groups for cache in group})
    alike = len(seen) == 1 and not any(len(of) != 1 or None in of for of in forms)
    if n < 1 or not alike or not (plain or len(forms) == 1):
        raise CachepressError(
            f"join: got groups of {', '.join(str(len(of)) for of in forms)} forms, texts of "
            f"{', '.join(map(str, seen))} tokens and n={n}, wanted compressed caches of one "
            "sequence each, of texts of one length, alike in each group, and n of at least 1; "
            "quantized rows and pages in one group only"
        )
    joined = copy.copy(groups[0][0])
    columns = [zip(*(stores(cache) for cache in group), strict=True) for group in groups]
    joined.layers = []
    joined.layers.extend(CompressedLayer.join(layer, n) for layer in zip(*columns, strict=True))
    return joined


def grouped(caches: Sequence[Cache]) -> list[list[int]]:
    """Which caches to join as a group, by their places: of one form, and even heads apart.

    Heads of one length are attended to much faster.
    """
    groups: dict[object, list[int]] = {}
    for place, cache in enumerate(caches):
        form = form_of(cache)
        rows = [layer.even for layer in stores(cache)]
        key = place if form is None else (form, None if None in rows else tuple(rows))
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def is_plain(cache: Cache) -> bool:
    """Whether rows are stored and read as they came, neither quantized nor by page."""
    return all(layer.codec is None and layer.page_budget is None for layer in stores(cache))


def ordinary(cache: Cache) -> Cache:
    """A copy of an uncompressed cache as transformers itself keeps it."""
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
