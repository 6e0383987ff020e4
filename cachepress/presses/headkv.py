"""HeadKV: retrieval heads of the whole model get larger budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from cachepress.budgets import PerLayer, Pyramid, TopK, apportion
from cachepress.errors import CachepressError
from cachepress.hf.types import PreTrainedModel
from cachepress.ops import on_device, wide
from cachepress.press import WrapperPress
from cachepress.presses._checks import counted
from cachepress.presses._heads import (
    Scores,
    checked,
    copying_scores,
    fitted,
    pattern_file,
    read_scores,
)
from cachepress.ranks import best, choose, pinned
from cachepress.view import LayerView


@dataclass(frozen=True)
class _AtLeastOne(TopK):
    """The best pairs of the whole model, as many as if every head kept its own, at least one."""

    def count(self, view: LayerView) -> Tensor:
        """Pairs that each head keeps on average, ``[B]``."""
        return super().count(view).clamp(min=1)


@dataclass(frozen=True)
class HeadKVPress(WrapperPress, alias="headkv"):
    """Gives each head of the model a fixed part of its budget, and a share of a pool by its score.

    Fu et al., "Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated
    Retrieval and Reasoning" (arXiv:2410.19258). Of the pairs that a head would keep, those that the
    inner press pins are its own, and so is 1 - 1 / ``beta`` of the others; the rest of all heads is
    the pool. What one head cannot use, because the text is shorter, the others share, so that the
    model's total is exactly that of equal budgets; rounding is by largest remainder. Where a head
    should have more pairs than it still holds at a later prompt, the best of all others take their
    place, so no pair is evicted before the whole forward is done. Without ``scores`` retrieval
    heads are found when the press first meets a model, from one random text in which a passage is
    repeated: the attention of a query in the second copy to the token that it copies next, averaged
    over the query heads of a KV head. The paper finds them with questions about a needle and adds
    reasoning, for which scores can be given. Needs what the inner press needs.
    Best for budgets of a few hundred pairs with SnapKV inside.

    Attributes:
        press: the press that scores; each layer must have the same budget. Who competes under it
            does not count.
        scores: a number for each KV head of each full-attention layer, or for each query head, or
            the path of a file with them: with tabs between them and a line for each layer, or JSON
            as the authors publish it; None to find them.
        beta: the smaller, the larger the pool: it is 1 / ``beta`` of the budget, ``beta`` >= 1.
    """

    scores: str | Scores | None = None
    beta: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(counted(self).amount, PerLayer | Pyramid):
            raise CachepressError(
                f"HeadKVPress shares out the pairs of the whole model, and {self.press!r} shares "
                "them among layers already: give it the press that scores"
            )
        if self.scores is not None and not isinstance(self.scores, str):
            object.__setattr__(self, "scores", checked(self.scores, "scores"))
        if isinstance(self.beta, bool) or not isinstance(self.beta, int | float) or self.beta < 1:
            raise CachepressError(f"beta: got {self.beta!r}, wanted a number of at least 1")

    @property
    def budget(self) -> TopK:
        """The inner budget, shared out among the heads of the model."""
        return _AtLeastOne(counted(self).amount, scope="model")

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by the inner press, the winners of each head above all, ``[B, H, T]``."""
        scores = wide(self.press.score(view))
        counts = self._counts(view, pinned(scores) & view.valid)
        return choose(scores, best(scores, view.valid, counts))

    @property
    def learned(self) -> Mapping[str, str]:
        """The option that names the file of the scores, if they are in one, and its kind."""
        return {"scores": "scores"} if isinstance(self.scores, str) else {}

    def files(self, model: str) -> Mapping[str, Sequence[Path]]:
        """The file of the scores."""
        if not isinstance(self.scores, str):
            return {}
        return {"scores": [pattern_file(self.scores)]}

    def for_model(self, model: PreTrainedModel) -> "HeadKVPress":
        """Find the scores of a model's heads, and make the inner press ready for it."""
        scores = self.scores
        if scores is None:
            scores = copying_scores(model)
        elif isinstance(scores, str):
            scores = read_scores(scores, "scores")
        scores = fitted(scores, model, "scores", by_query=True)
        return replace(self, press=self.press.for_model(model), scores=scores)

    def _counts(self, view: LayerView, pins: Tensor) -> Tensor:
        """Count the pairs of each head of the layer, ``[B, H, 1]``."""
        if not isinstance(self.scores, tuple):
            raise TypeError("the press was not made ready for the model")
        pins = pins.sum(-1).amin(-1)  # [B]
        # Shares are whole numbers found one by one: asked for at once, as a device is waited for.
        budgets = torch.stack([view.n_kept.double(), pins.double(), view.n_seen.double()], dim=1)
        counts = [
            shares(self.scores, self.beta, round(kept), int(own), int(seen))[view.depth]
            for kept, own, seen in budgets.tolist()
        ]
        return on_device(torch.tensor(counts), view.valid.device).unsqueeze(-1)


@lru_cache(maxsize=256)
def shares(scores: Scores, beta: float, kept: int, own: int, seen: int) -> list[list[int]]:
    """Share out the pairs of the model among its heads, by layer.

    Args:
        scores: of each KV head of each layer.
        beta: 1 / ``beta`` of what is free goes into the pool.
        kept: pairs of a head on average, from 1 to ``seen``.
        own: of these, pairs that every head keeps.
        seen: tokens of the text, which no head can have more of.
    """
    own = min(own, kept)
    weights = torch.tensor([x for heads in scores for x in heads], dtype=torch.double)
    weight = float(weights.sum())
    parts = weights / weight if weight else torch.full_like(weights, 1 / len(weights))
    fixed, pool = own + (kept - own) * (1 - 1 / beta), (kept - own) / beta * len(weights)
    least = min(kept, max(1, own))
    counts = iter(apportion(fixed + pool * parts, kept * len(weights), least, seen).tolist())
    return [[next(counts) for _ in heads] for heads in scores]
