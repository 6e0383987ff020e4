"""What presses share that guess a row's score from its hidden state."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.press import ScorerPress
from cachepress.presses._scores import noted_or_carried, unknown_as_average
from cachepress.view import LayerView, Needs

_BLOCK = 4096


@dataclass(frozen=True)
class _SurrogatePress(ScorerPress):
    """A press whose score of a row is guessed when the row is made, and stays with it.

    Rows whose hidden states nobody saw, such as tokens that were decoded outside of the ``with``
    block, count as average.
    """

    @property
    def needs(self) -> Needs:
        """A guess from the hidden states that attention reads, kept until the next compression."""
        return Needs(hidden=_Guess(self), token_state=True)

    def guess(self, hidden: Tensor, depth: int) -> Tensor:
        """The score of each row, ``[B, H, n]``, from hidden states ``[B, n, M]`` of a layer."""
        raise NotImplementedError(f"{type(self).__name__} has no guess")

    def score(self, view: LayerView) -> Tensor:
        """The guess, ``[B, H, T]``."""
        return unknown_as_average(self.token_state(view), view.valid)

    def token_state(self, view: LayerView) -> Tensor:
        """The guess of each row, from this turn or an earlier one."""
        if view.hidden_feature is None:
            raise TypeError("the view was made without hidden states")
        return noted_or_carried(view, view.hidden_feature)


@dataclass(frozen=True)
class _Guess:
    """The guess of a press, equal to that of an equal press: what was noted stays good."""

    press: _SurrogatePress

    def __call__(self, hidden: Tensor, depth: int) -> Tensor:
        """The score of each row, ``[B, H, n]``, one block of rows at a time."""
        parts = [self.press.guess(part, depth) for part in hidden.split(_BLOCK, dim=1)]
        return torch.cat(parts, dim=-1)
