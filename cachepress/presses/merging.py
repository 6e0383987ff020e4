"""Merging: a dropped row leaves its value in the kept row that is most like it."""

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.budgets import check_fraction, floor_of
from cachepress.ops import wide
from cachepress.press import WrapperPress
from cachepress.ranks import best
from cachepress.view import LayerView

_BLOCK = 1024
"""Rows whose likeness is held at once, dropped and kept ones."""


@dataclass(frozen=True)
class MergingPress(WrapperPress, alias="merging"):
    """Blends the value of each dropped row into the kept row whose key is most like its own.

    In the spirit of Bolya et al., "Token Merging: Your ViT But Faster" (arXiv:2210.09461) and Wan
    et al., "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large
    Language Models" (arXiv:2406.13035). Alike is by cosine, of equals the oldest row is taken. A
    dropped value v_i weighs w_i = cosine * |v_i| / (|v_i| + |v_j|), and the kept one becomes
    (v_j + sum of w_i v_i) / (1 + sum of w_i). Keys stay, so positions do. Rows leave something in
    their own head only, and nothing in a head that keeps none. A row leaves its value once: what
    the inner press folded already is not blended again. Needs nothing but keys and values, and
    time that grows with dropped times kept rows; memory does not.
    Best for high ratios, where what is dropped still counts in sum.

    Attributes:
        press: the press that chooses the rows.
        similarity_threshold: least cosine of rows that are merged, from 0 to 1.
        merge_fraction: fraction of the dropped rows of a head that are merged, rounded down; the
            most alike ones.
    """

    similarity_threshold: float = 0.0
    merge_fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.similarity_threshold, "similarity_threshold")
        check_fraction(self.merge_fraction, "merge_fraction")

    def merge(self, view: LayerView, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys as they are, and values with what dropped rows leave in them."""
        merged, dropped = self.press.merge(view, mask), view.valid & ~mask
        if not bool(dropped.any()):
            return merged
        keys, values = (view.keys, view.values) if merged is None else merged
        values = values.clone()
        for b, h in product(*map(range, mask.shape[:2])):
            kept, lost = (x[b, h].nonzero()[:, 0] for x in (mask, dropped))
            if len(kept) and len(lost):
                self._blend(keys[b, h], values[b, h], kept, lost)
        return keys, values

    def _blend(self, keys: Tensor, values: Tensor, kept: Tensor, lost: Tensor) -> None:
        """Blend the rows ``lost [n]`` of ``values [T, E]`` into the rows ``kept [m]``, in place."""
        likeness, target = most_alike(keys[lost], keys[kept])
        count = likeness.new_full((1, 1, 1), len(lost), dtype=torch.double)
        alike = likeness >= self.similarity_threshold
        most = floor_of(count, self.merge_fraction)
        some = best(likeness[None, None], alike[None, None], most)[0, 0]
        lost, target, likeness = lost[some], target[some], likeness[some]
        own, theirs = wide(values[lost]), wide(values[kept])
        norm = own.norm(dim=-1)
        share = norm / (norm + theirs.norm(dim=-1)[target]).clamp(min=torch.finfo().tiny)
        weight = (likeness.clamp(min=0) * share).unsqueeze(-1)
        total = torch.ones_like(theirs[:, :1]).index_add_(0, target, weight)
        values[kept] = (theirs.index_add_(0, target, weight * own) / total).to(values.dtype)
        values[lost] = 0


def most_alike(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For each of ``rows [n, D]`` the highest cosine to one of ``others [m, D]``, and which."""
    rows, others = F.normalize(wide(rows), dim=-1), F.normalize(wide(others), dim=-1)
    found = [_most_alike(block, others) for block in rows.split(_BLOCK)]
    likeness, index = zip(*found, strict=True)
    return torch.cat(likeness), torch.cat(index)


def _most_alike(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    likeness = torch.full_like(rows[:, 0], float("-inf"))
    index = torch.zeros_like(likeness, dtype=torch.long)
    for start in range(0, len(others), _BLOCK):
        top, where = (rows @ others[start : start + _BLOCK].mT).max(-1)
        index = torch.where(top > likeness, where + start, index)
        likeness = torch.maximum(likeness, top)
    return likeness, index
