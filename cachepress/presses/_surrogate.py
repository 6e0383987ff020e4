"""Base class of presses that predict a token's score from its hidden state."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.ops import blocks
from cachepress.press import ScorerPress
from cachepress.presses._scores import feature_or_state, nan_as_average
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class _SurrogatePress(ScorerPress):
    """A press whose score of a token is predicted when it is read, and kept with the token.

    Tokens whose hidden states were not observed, such as those decoded outside of the ``with``
    block, count as average.
    """

    @property
    def needs(self) -> Needs:
        """A prediction from the hidden states that attention reads, kept with the token."""
        return Needs(hidden=_Prediction(self), token_state=True)

    def predict(self, hidden: Tensor, depth: int) -> Tensor:
        """Predict scores ``[B, H, n]`` from the hidden states ``[B, n, M]`` of a layer."""
        raise NotImplementedError(f"{type(self).__name__} has no prediction")

    def score(self, view: LayerView) -> Tensor:
        """The predicted score, ``[B, H, T]``."""
        return nan_as_average(self.token_state(view), view.valid)

    def token_state(self, view: LayerView) -> Tensor:
        """The predicted score of each pair, from this forward or an earlier one."""
        if view.hidden_feature is None:
            raise TypeError("the view was made without hidden states")
        return feature_or_state(view, view.hidden_feature)


@dataclass(frozen=True)
class _Prediction:
    """The hidden feature of a press; those of equal presses are equal, so they can be shared."""

    press: _SurrogatePress

    def __call__(self, hidden: Tensor, depth: int) -> Tensor:
        """Predict the score of each pair, ``[B, H, n]``, one block of tokens at a time."""
        b, n, m = hidden.shape
        parts = [self.press.predict(hidden[:, some], depth) for some in blocks(n, b * m)]
        return torch.cat(parts, dim=-1)
