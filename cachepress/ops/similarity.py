"""Which keys of a head are most alike, or alike at all, without a matrix of all cosines.

Shape letters are those of ``cachepress.view``.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.ops.device import known_counts
from cachepress.ops.order import valid_last
from cachepress.ops.precision import wide, wide_dtype

_BLOCK = 1024
"""Keys that are compared with as many others at once."""
_NUMBERS = 1 << 22
"""Numbers of the keys that few others are compared with at once."""


def most_similar(keys: Tensor, some: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Find the most similar of the ``others [B, H, T]`` for ``some`` of ``keys [B, H, T, D]``.

    Returns:
        The cosine, minus infinity where a head has no others, and which of the ``T`` it is, of
        equals the oldest, both ``[B, H, T]``; for a key that is not one of ``some`` they mean
        nothing.
    """
    cosine = torch.full(some.shape, float("-inf"), dtype=wide_dtype(keys), device=keys.device)
    index = torch.zeros(some.shape, dtype=torch.long, device=keys.device)
    rows, columns = valid_last(~some), valid_last(~others)
    counts = [known_counts(x.sum(-1), keys.shape[2]) for x in (some, others)]
    for (b, h), n, m in zip(product(*map(range, some.shape[:2])), *counts, strict=True):
        directions = _Directions(keys[b, h])
        for row in rows[b, h, :n].split(_BLOCK):
            own, top, where = directions.of(row), cosine[b, h, row], index[b, h, row]
            for column in columns[b, h, :m].split(_BLOCK) if m else ():
                cosines = own @ directions.of(column).mT
                if keys.device.type != "cpu":  # In the host's memory all are others.
                    cosines.masked_fill_(~others[b, h, column], float("-inf"))
                best, at = cosines.max(-1)
                where = torch.where(best > top, column[at], where)
                top = torch.maximum(top, best)
            cosine[b, h].index_copy_(0, row, top)
            index[b, h].index_copy_(0, row, where)
    return cosine, index


def newest_similar(keys: Tensor, valid: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Find the newest other key that is similar to each ``valid [B, H, T]`` one of ``keys``.

    It is searched from the end of the text, and no further than it has to.

    Args:
        keys: ``[B, H, T, D]``; one that is not finite is similar to none.
        valid: which of them are compared.
        threshold: the cosine above which two keys are similar, at least 0.

    Returns:
        The cosine, and which of the ``T`` it is, -1 for none, both ``[B, H, T]``.
    """
    cosine = torch.zeros(valid.shape, dtype=wide_dtype(keys), device=keys.device)
    index = torch.full(valid.shape, -1, device=keys.device)
    for b, h in product(*map(range, valid.shape[:2])):
        _search(keys[b, h], valid[b, h], threshold, cosine[b, h], index[b, h])
    return cosine, index


def _search(keys: Tensor, valid: Tensor, threshold: float, cosine: Tensor, index: Tensor) -> None:
    """Find the newest similar keys in one head, block by block from the end."""
    t, d = keys.shape
    directions = _Directions(keys, valid)
    pending, stop, size = valid_last(~valid), t, _BLOCK
    (n,) = known_counts(valid.sum(), t)
    while stop and n:
        start = max(0, stop - size)
        column = torch.arange(start, stop, dtype=torch.int32, device=keys.device)
        others = directions.of(slice(start, stop)).mT
        pending = pending[:n]
        for row in pending.split(_BLOCK):
            cosines = directions.of(row) @ others
            similar = (cosines > threshold) & (row[:, None] != column)
            newest = torch.where(similar, column, -1).amax(-1).long()
            own = cosines.gather(-1, (newest - start).clamp(min=0)[:, None])[:, 0]
            first = (newest >= 0) & (index[row] < 0)
            cosine.index_copy_(0, row, torch.where(first, own, cosine[row]))
            index.index_copy_(0, row, torch.where(first, newest, index[row]))
        found, stop = index[pending] >= 0, start
        pending = pending[valid_last(found)]
        (n,) = known_counts((~found).sum(), n)
        # Where few keys are pending, many others fit into the same memory.
        size = min(_BLOCK * max(1, _BLOCK // max(1, n)), max(_BLOCK, _NUMBERS // d))


class _Directions:
    """The keys of a head scaled to length 1: all at once, unless the text is long.

    Args:
        keys: ``[T, D]``.
        valid: ``[T]``, where keys that are not valid, or not finite, are to be zero.
    """

    def __init__(self, keys: Tensor, valid: Tensor | None = None) -> None:
        self._keys, self._valid = keys, valid
        self._all = self._scaled(slice(None)) if keys.numel() <= 2 * _NUMBERS else None

    def of(self, rows: Tensor | slice) -> Tensor:
        """Return those of some keys, ``[n, D]``."""
        return self._scaled(rows) if self._all is None else self._all[rows]

    def _scaled(self, rows: Tensor | slice) -> Tensor:
        if self._valid is None:
            return F.normalize(wide(self._keys[rows]), dim=-1)
        return finite_directions(self._keys[rows], self._valid[rows])


def finite_directions(keys: Tensor, valid: Tensor) -> Tensor:
    """Scale ``keys [..., D]`` to length 1; those not valid or not finite are zero."""
    directions = F.normalize(wide(keys), dim=-1).masked_fill(~valid.unsqueeze(-1), 0)
    return directions.nan_to_num(nan=0.0)
