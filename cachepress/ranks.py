"""Ranks: which pairs go before all scores, in tiers, and which have the highest scores.

A pinned pair has a number above every sensible score, so that any budget honours it: sinks first,
then the newest tokens of a window, then what a press chose, then what is free, however small the
budget is. A tier holds places for two million tokens; beyond that tokens tie, and of equal numbers
the newest stay.
"""

import torch
from torch import Tensor

from cachepress.ops import wide
from cachepress.view import LayerView

FREE = 1e38
"""No free score is higher."""
TAKEN = 1.5e38
_WINDOW = 2.4e38
_SINK = 3.4e38
# A step is above the distance of two float32 numbers of this size, and all places of a tier
# together stay below the distance of two tiers.
_STEP, _PLACES = 4e31, 2**21


def pin_sinks(scores: Tensor, view: LayerView, n: int) -> Tensor:
    """Scores with the first ``n`` tokens of each text above all others, the earliest highest."""
    return pin_first(scores, view, view.index < n)


def pin_first(scores: Tensor, view: LayerView, tokens: Tensor) -> Tensor:
    """Scores with the tokens ``[B, H, T]`` above all others, as sinks are, the earliest highest."""
    place = view.index.clamp(max=_PLACES).float()
    return torch.where(tokens, _SINK - _STEP * place, wide(scores))


def pin_window(scores: Tensor, view: LayerView, n: int | Tensor) -> Tensor:
    """Scores with the last ``n`` tokens of each text above every free one, the newest highest.

    ``n`` may be ``[B]``. Tokens of the same age are alike in all heads, so heads that compete and
    cannot keep all of them share what there is.
    """
    age = view.n_seen[:, None, None] - view.index
    recent = age <= (n[:, None, None] if isinstance(n, Tensor) else n)
    place = age.clamp(max=_PLACES).float()
    return torch.where(recent, _WINDOW - _STEP * place, wide(scores))


def pin(scores: Tensor, tokens: Tensor) -> Tensor:
    """Scores with the tokens ``[B, H, T]`` above every free one; pinned ones stay as they are."""
    return torch.where(tokens & ~pinned(scores), TAKEN, wide(scores))


def choose(scores: Tensor, tokens: Tensor) -> Tensor:
    """Scores with the tokens ``[B, H, T]`` above every other one, pinned or free."""
    return torch.where(tokens, TAKEN, wide(scores).clamp(max=FREE))


def pinned(scores: Tensor) -> Tensor:
    """Which tokens are pinned."""
    return scores > FREE


def best(scores: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """Mask of the ``counts [B, H or 1, 1]`` highest scores ``[B, H, T]`` among the valid rows.

    Of equal scores the newest rows are taken; NaN is the lowest score.
    """
    scores = wide(scores)
    worst = torch.finfo(scores.dtype).min
    scores = scores.nan_to_num(nan=worst, posinf=None, neginf=worst)
    scores = scores.masked_fill(~valid, float("-inf"))
    newest_first = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    ranked = (torch.arange(scores.shape[-1], device=scores.device) < counts).expand_as(scores)
    mask = torch.zeros_like(valid).scatter_(-1, newest_first, ranked)
    return mask.flip(-1) & valid
