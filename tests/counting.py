"""A press whose kept pairs stand for the evicted ones before them: its bias is their logarithm."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import cachepress as cp


@dataclass(frozen=True)
class CountingPress(cp.ScorerPress):
    """Keeps the pairs with the shortest keys, and lets each count for those that it replaces.

    Those are the evicted pairs between it and the kept one before it, with all that they had stood
    for themselves. Of tokens that come twice the newer one counts as shorter.
    """

    @property
    def needs(self) -> cp.Needs:
        return cp.Needs(pair_bias=True)

    def score(self, view: cp.LayerView) -> Tensor:
        return 1e-4 * view.index - view.keys.norm(dim=-1)

    def pair_bias(self, view: cp.LayerView, mask: Tensor) -> Tensor:
        each = view.valid.double()
        if view.pair_bias is not None:
            each = each * view.pair_bias.double().exp()
        so_far = each.cumsum(-1)
        before = F.pad((so_far * mask).cummax(-1).values, (1, 0))[..., :-1]
        return (so_far - before).clamp(min=1).log()


@dataclass(frozen=True)
class HidingPress(cp.ScorerPress):
    """Evicts nothing, and hides the pairs with the longest keys, half of those of each head."""

    bias: float = torch.finfo(torch.float32).min

    @property
    def needs(self) -> cp.Needs:
        return cp.Needs(pair_bias=True)

    def score(self, view: cp.LayerView) -> Tensor:
        return -view.keys.norm(dim=-1)

    def pair_bias(self, view: cp.LayerView, mask: Tensor) -> Tensor:
        shown = cp.KnormPress(0.5).budget.select(self.score(view), view.valid, view.n_seen // 2)
        return torch.zeros(mask.shape).masked_fill(~shown, self.bias)
