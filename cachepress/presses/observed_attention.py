"""Observed attention: tokens that the whole prompt attends to."""

from dataclasses import dataclass

from torch import Tensor

from cachepress.press import ScorerPress
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class ObservedAttentionPress(ScorerPress, alias="observed_attention"):
    """Keeps the tokens that received the most attention, averaged over the queries that see them.

    A prefill form of the accumulated score of Zhang et al., "H2O: Heavy-Hitter Oracle for
    Efficient Generative Inference of Large Language Models" (arXiv:2306.14048). Needs the
    attention sums, which cost about one more attention pass; no T x T matrix is made. Best for
    comparison with methods that observe less.
    """

    @property
    def needs(self) -> Needs:
        """The attention that each token received."""
        return Needs(attention_sums=True)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by mean attention received over queries and query heads, ``[B, H, T]``."""
        if view.attention_sums is None or view.attention_counts is None:
            raise TypeError("the view was made without attention sums")
        return view.attention_sums.mean(2) / view.attention_counts.clamp(min=1)
