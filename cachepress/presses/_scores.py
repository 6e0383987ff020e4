"""What several scores are made of; a scorer need not know of it."""

import torch
from torch import Tensor

from cachepress.ops import wide_dtype
from cachepress.view import LayerView


def noted_or_carried(view: LayerView, hidden_feature: Tensor) -> Tensor:
    """What was noted of each row in this turn, ``[B, H, T]``, else what an earlier one left."""
    return (
        hidden_feature
        if view.token_state is None
        else torch.where(hidden_feature.isnan(), view.token_state, hidden_feature)
    )


def unknown_as_average(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores ``[B, H, T]`` in which NaN is the mean of its head's finite scores of valid rows."""
    known = valid & scores.isfinite()
    total = scores.masked_fill(~known, 0).double().sum(-1, keepdim=True)
    average = (total / known.sum(-1, keepdim=True).clamp(min=1)).to(wide_dtype(scores))
    return torch.where(scores.isnan(), average, scores)


def mean_of_token(x: Tensor, view: LayerView) -> Tensor:
    """Mean of ``x [B, H, T]`` over the heads that hold the same token, ``[B, H, T]``.

    Heads that dropped rows in an earlier turn have different tokens in the same place.
    """
    b, h, _ = x.shape
    size = int(view.n_seen.max())
    column = view.index.long().masked_fill(~view.valid, size)

    def by_token(y: Tensor) -> Tensor:
        return y.new_zeros(b, h, size + 1).scatter(-1, column, y).sum(1, keepdim=True)

    mean = by_token(x) / by_token(view.valid.to(x.dtype)).clamp(min=1)
    return mean.expand(-1, h, -1).gather(-1, column)
