"""Arithmetic that several scorers share."""

import torch
from torch import Tensor

from cachepress.ops import wide_dtype
from cachepress.view import LayerView


def feature_or_state(view: LayerView, hidden_feature: Tensor) -> Tensor:
    """Take each pair's new feature, ``[B, H, T]``, or the state kept with its token; else NaN."""
    return (
        hidden_feature
        if view.token_state is None
        else torch.where(hidden_feature.isnan(), view.token_state, hidden_feature)
    )


def nan_as_average(scores: Tensor, valid: Tensor) -> Tensor:
    """Replace NaN in ``scores [B, H, T]`` by the mean of the head's finite, valid scores."""
    finite = valid & scores.isfinite()
    total = scores.masked_fill(~finite, 0).double().sum(-1, keepdim=True)
    average = (total / finite.sum(-1, keepdim=True).clamp(min=1)).to(wide_dtype(scores))
    return torch.where(scores.isnan(), average, scores)


def mean_of_token(x: Tensor, view: LayerView) -> Tensor:
    """Average ``x [B, H, T]`` over the heads that hold the same token, ``[B, H, T]``.

    By index in the text: heads that evicted tokens before hold different ones in the same column.
    """
    b, h, _ = x.shape
    size = view.longest()
    column = view.index.long().masked_fill(~view.valid, size)

    def by_token(y: Tensor) -> Tensor:
        return y.new_zeros(b, h, size + 1).scatter(-1, column, y).sum(1, keepdim=True)

    mean = by_token(x) / by_token(view.valid.to(x.dtype)).clamp(min=1)
    return mean.expand(-1, h, -1).gather(-1, column)
