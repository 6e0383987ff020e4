"""What presses share that guess a row's score from its hidden state."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.presses.base import ScorerPress
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class _SurrogatePress(ScorerPress):
    """A press whose score of a row is guessed when the row is made, and stays with it."""

    @property
    def needs(self) -> Needs:
        """A guess from the hidden states that attention reads."""
        return Needs(hidden=self.guess)

    @property
    def carries(self) -> bool:
        """True: hidden states are gone when a row is looked at again."""
        return True

    def guess(self, hidden: Tensor, depth: int) -> Tensor:
        """The score of each row, ``[B, H, n]``, from hidden states ``[B, n, M]`` of a layer."""
        raise NotImplementedError(f"{type(self).__name__} has no guess")

    def score(self, view: LayerView) -> Tensor:
        """The guess, ``[B, H, T]``."""
        return self.carry(view)

    def carry(self, view: LayerView) -> Tensor:
        """The guess of each row, from this turn or an earlier one."""
        if view.noted is None:
            raise TypeError("the view was made without hidden states")
        if view.carried is None:
            return view.noted
        return torch.where(view.noted.isnan(), view.carried, view.noted)
