"""CriticalKV: scores weighted by what a pair adds to the layer's output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.budgets import TopK, check_fraction, floor_of
from cachepress.errors import CachepressError
from cachepress.ops import by_token, wide, wide_dtype
from cachepress.press import WrapperPress
from cachepress.presses._checks import check_by_layer, counted
from cachepress.presses.adakv import AdaKVPress
from cachepress.ranks import best, choose, pin, pinned
from cachepress.view import LayerView, Needs

_AT_ONCE = 512
"""Channels of the layer's output that are computed at once."""


@dataclass(frozen=True)
class CriticalKVPress(WrapperPress, alias="critical"):
    """Multiplies a score by the norm of what each value adds to the layer's output.

    Feng et al., "Identify Critical KV Cache in LLM Inference from an Output Perturbation
    Perspective" (arXiv:2502.03805). A first stage keeps the best pairs by the inner score; the rest
    of the budget goes to the highest (score + epsilon) * |W_O v|_1. Scores below zero are lifted,
    so that the product keeps their order. Needs the output projection. Best for a gain in quality
    around any attention score.

    Attributes:
        press: the press that scores; a budget that heads of a layer compete for is honoured in
            both stages.
        epsilon: added to the score before the product.
        first_stage_ratio: fraction of each head's budget that the inner score alone fills.
    """

    epsilon: float = 1e-4
    first_stage_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.first_stage_ratio, "first_stage_ratio")
        if not isinstance(self.epsilon, int | float) or self.epsilon < 0:
            raise CachepressError(f"epsilon: got {self.epsilon!r}, wanted a number >= 0")
        counted(self)
        check_by_layer(self)

    @property
    def needs(self) -> Needs:
        """What the inner press needs, and the output projection."""
        return self.press.needs | Needs(projection=True)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by score times projected value norm, those kept above all, ``[B, H, T]``."""
        scores = wide(self.press.score(view))
        budgets = counted(self).select(scores, view.valid, view.n_kept).sum(-1, keepdim=True)
        free = scores.masked_fill(~view.valid | pinned(scores), 0)
        lifted = free - free.amin(-1, keepdim=True).clamp(max=0)
        weighted = (lifted + self.epsilon) * projected_norms(view)
        weighted = torch.where(pinned(scores), scores, weighted)
        first = floor_of(budgets.double(), self.first_stage_ratio)
        chosen = best(scores, view.valid, first)
        return choose(weighted, best(pin(weighted, chosen), view.valid, budgets))


@dataclass(frozen=True)
class CriticalAdaKVPress(WrapperPress, alias="critical_adakv"):
    """Applies CriticalKV with competing heads: ``CriticalKVPress(AdaKVPress(press))``.

    Feng et al. (arXiv:2502.03805 and arXiv:2407.11550). Needs the output projection. Best for
    high ratios around any attention score.

    Attributes:
        press: the press that scores.
        alpha_safeguard: fraction of an equal share that every head keeps whatever its scores.
        epsilon: added to the score before the product.
        first_stage_ratio: fraction of each head's budget that the inner score alone fills.
    """

    alpha_safeguard: float = 0.20
    epsilon: float = 1e-4
    first_stage_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._composed()

    @property
    def needs(self) -> Needs:
        """What the inner press needs, and the output projection."""
        return self._composed().needs

    @property
    def budget(self) -> TopK:
        """The inner budget, for the heads of a layer together."""
        return AdaKVPress(self.press, self.alpha_safeguard).budget

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by score times projected value norm, ``[B, H, T]``."""
        return self._composed().score(view)

    def _composed(self) -> CriticalKVPress:
        adaptive = AdaKVPress(self.press, self.alpha_safeguard)
        return CriticalKVPress(adaptive, self.epsilon, self.first_stage_ratio)


def projected_norms(view: LayerView) -> Tensor:
    """L1 norm of each value after the output projection, mean over query heads, ``[B, H, T]``."""
    if view.projection is None:
        raise TypeError("the view was made without the output projection")
    (b, h, t, _), g = view.values.shape, view.projection.shape[1]
    total = view.values.new_zeros(b, h, t, dtype=wide_dtype(view.values))
    for projection in view.projection.split(_AT_ONCE, dim=-1):
        # The query heads of a group side by side, so that values are multiplied once for all.
        columns = wide(projection).transpose(1, 2).flatten(2)  # [H, E, G * m]
        each = b * columns[:, 0].numel()
        total += by_token(lambda v, w=columns: (wide(v) @ w).abs_().sum(-1), view.values, each=each)
    return total / g
