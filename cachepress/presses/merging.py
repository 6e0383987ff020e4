"""Merging: evicted values are blended into the kept values with the most similar keys."""

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
"""Evicted, and kept, tokens whose similarities are in memory at once."""


@dataclass(frozen=True)
class MergingPress(WrapperPress, alias="merging"):
    """Merges the value of each evicted token into the kept token with the most similar key.

    In the spirit of Bolya et al., "Token Merging: Your ViT But Faster" (arXiv:2210.09461) and Wan
    et al., "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large
    Language Models" (arXiv:2406.13035). Similarity is the cosine, of equals the oldest token is
    taken. An evicted value v_i weighs w_i = cosine * |v_i| / (|v_i| + |v_j|), and the kept one
    becomes (v_j + sum of w_i v_i) / (1 + sum of w_i). Keys stay, so positions do. Tokens are merged
    within their own head only, and not in a head that keeps none. A value is merged once: what the
    inner press merged already is not merged again. Needs nothing but keys and values, and takes
    time that grows with evicted times kept tokens; memory does not.
    Best for high ratios, where evicted tokens still count in sum.

    Attributes:
        press: the press that chooses the tokens.
        similarity_threshold: least cosine of keys whose values are merged, from 0 to 1.
        merge_fraction: fraction of the evicted tokens of a head that are merged, rounded down; the
            most similar ones.
    """

    similarity_threshold: float = 0.0
    merge_fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.similarity_threshold, "similarity_threshold")
        check_fraction(self.merge_fraction, "merge_fraction")

    def merge(self, view: LayerView, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """Merge evicted values into kept ones; keys stay as they are."""
        merged, evicted = self.press.merge(view, mask), view.valid & ~mask
        if not bool(evicted.any()):
            return merged
        keys, values = (view.keys, view.values) if merged is None else merged
        values = values.clone()
        for b, h in product(*map(range, mask.shape[:2])):
            kept, gone = (x[b, h].nonzero()[:, 0] for x in (mask, evicted))
            if len(kept) and len(gone):
                self._blend(keys[b, h], values[b, h], kept, gone)
        return keys, values

    def _blend(self, keys: Tensor, values: Tensor, kept: Tensor, gone: Tensor) -> None:
        """Blend ``values [T, E]`` of the evicted ``gone [n]`` into ``kept [m]``, in place."""
        cosine, target = most_similar(keys[gone], keys[kept])
        count = cosine.new_full((1, 1, 1), len(gone), dtype=torch.double)
        similar = cosine >= self.similarity_threshold
        most = floor_of(count, self.merge_fraction)
        some = best(cosine[None, None], similar[None, None], most)[0, 0]
        gone, target, cosine = gone[some], target[some], cosine[some]
        own, theirs = wide(values[gone]), wide(values[kept])
        norm = own.norm(dim=-1)
        both = norm + theirs.norm(dim=-1)[target]
        share = norm / both.clamp(min=torch.finfo(torch.float32).tiny)
        # A negative cosine would subtract the value, and could bring the total to zero.
        weight = (cosine.clamp(min=0) * share).unsqueeze(-1)
        total = torch.ones_like(theirs[:, :1]).index_add_(0, target, weight)
        values[kept] = (theirs.index_add_(0, target, weight * own) / total).to(values.dtype)
        # Merged once: a wrapper around this press finds nothing left to merge a second time.
        values[gone] = 0


def most_similar(keys: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Find for each of ``keys [n, D]`` the most similar of ``others [m, D]``: cosine and index."""
    keys, others = F.normalize(wide(keys), dim=-1), F.normalize(wide(others), dim=-1)
    found = [_most_similar(block, others) for block in keys.split(_BLOCK)]
    cosine, index = zip(*found, strict=True)
    return torch.cat(cosine), torch.cat(index)


def _most_similar(keys: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    cosine = torch.full_like(keys[:, 0], float("-inf"))
    index = torch.zeros_like(cosine, dtype=torch.long)
    for start in range(0, len(others), _BLOCK):
        top, where = (keys @ others[start : start + _BLOCK].mT).max(-1)
        index = torch.where(top > cosine, where + start, index)  # Of equals the oldest.
        cosine = torch.maximum(cosine, top)
    return cosine, index
