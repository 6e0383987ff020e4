"""Merging: evicted values are blended into the kept values with the most similar keys."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from cachepress.budgets import check_fraction, floor_of
from cachepress.ops import blocks, known_counts, most_similar, norms, valid_last, wide
from cachepress.press import WrapperPress
from cachepress.ranks import best
from cachepress.view import LayerView

_BLOCK = 1024
"""Evicted tokens whose values are blended at once."""


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
        if not any(known_counts(evicted.sum(-1), mask.shape[-1])):
            return merged
        keys, values = (view.keys, view.values) if merged is None else merged
        cosine, target = most_similar(keys, evicted, mask)
        similar = evicted & (cosine >= self.similarity_threshold)
        most = floor_of(evicted.sum(-1, keepdim=True).double(), self.merge_fraction)
        some = best(cosine, similar, most)
        # A negative cosine would subtract the value, and could bring the total to zero.
        return keys, _blended(values, cosine.clamp(min=0), target, some)


def _blended(values: Tensor, cosine: Tensor, target: Tensor, some: Tensor) -> Tensor:
    """Blend the values ``[B, H, T, E]`` of ``some [B, H, T]`` into those of their ``target``."""
    norm = norms(values)
    both = norm + norm.gather(-1, target)
    share = norm / both.clamp(min=torch.finfo(torch.float32).tiny)
    weight = torch.where(some, cosine * share, 0)
    total = torch.ones_like(weight).scatter_add_(-1, target, weight)
    blended, t = torch.empty_like(values), values.shape[2]
    rows, counts = valid_last(~some), known_counts(some.sum(-1), t)
    for (b, h), n in zip(product(*map(range, some.shape[:2])), counts, strict=True):
        # Some channels at a time, which bounds the memory of a long text.
        for part in blocks(values.shape[3], t):
            own = values[b, h, :, part]
            sums = wide(own).clone()
            for row in rows[b, h, :n].split(_BLOCK):
                # Where nothing is merged the weight is 0, but a value may not be finite.
                lost = some[b, h, row].unsqueeze(-1)
                added = (wide(own[row]) * weight[b, h, row].unsqueeze(-1)).masked_fill(~lost, 0)
                sums.index_add_(0, target[b, h, row], added)
            blended[b, h, :, part] = sums / total[b, h].unsqueeze(-1)
    # Merged once: a wrapper around this press finds nothing left to merge a second time.
    return blended.masked_fill_(some.unsqueeze(-1), 0)
