"""Pins tokens above all scores, in tiers, and finds the pairs with the highest scores.

A pinned token gets a number above every free score, so that every budget keeps it as long as it can
keep anything: sinks first, then the newest tokens of a window, then what a press chose, then free
tokens by their scores. A tier has places for two million tokens; beyond that tokens tie, and of
equal numbers the newest are kept.
"""

import torch
from torch import Tensor

from cachepress.ops import wide
from cachepress.view import LayerView

FREE = 1e38
"""The highest score that is free, that is not pinned."""
TAKEN = 1.5e38
_WINDOW = 2.4e38
_SINK = 3.4e38
# A step is above the distance of two float32 numbers of this size, and all places of a tier
# together stay below the distance of two tiers.
_STEP, _PLACES = 4e31, 2**21


def pin_sinks(scores: Tensor, view: LayerView, n: int) -> Tensor:
    """Put the first ``n`` tokens of each text above all others, the earliest highest."""
    return pin_first(scores, view, view.index < n)


def pin_first(scores: Tensor, view: LayerView, tokens: Tensor) -> Tensor:
    """Put the tokens ``[B, H, T]`` above all others, as sinks are, the earliest highest."""
    place = view.index.clamp(max=_PLACES).float()
    return torch.where(tokens, _SINK - _STEP * place, wide(scores))


def pin_window(scores: Tensor, view: LayerView, n: int | Tensor) -> Tensor:
    """Put the last ``n`` tokens of each text above every free one, the newest highest.

    ``n`` may be ``[B]``. A token has the same score in all heads, so that heads that compete for
    too few pairs get equally many of them.
    """
    age = view.n_seen[:, None, None] - view.index
    recent = age <= (n[:, None, None] if isinstance(n, Tensor) else n)
    place = age.clamp(max=_PLACES).float()
    return torch.where(recent, _WINDOW - _STEP * place, wide(scores))


def pin(scores: Tensor, tokens: Tensor) -> Tensor:
    """Put the tokens ``[B, H, T]`` above every free one; pinned ones keep their tier."""
    return torch.where(tokens & ~pinned(scores), TAKEN, wide(scores))


def choose(scores: Tensor, tokens: Tensor) -> Tensor:
    """Put the tokens ``[B, H, T]`` above all others, whatever these scored or were pinned to."""
    return torch.where(tokens, TAKEN, wide(scores).clamp(max=FREE))


def pinned(scores: Tensor) -> Tensor:
    """Tell which tokens are pinned."""
    return scores > FREE


def best(scores: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """Find the ``counts [B, H or 1, 1]`` highest valid scores of ``[B, H, T]``, as a mask.

    Of equal scores the newest tokens are taken; NaN is the lowest score.
    """
    scores = wide(scores)
    worst = torch.finfo(scores.dtype).min
    scores = scores.nan_to_num(nan=worst, posinf=None, neginf=worst)
    scores = scores.masked_fill(~valid, float("-inf"))
    newest_first = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    ranked = (torch.arange(scores.shape[-1], device=scores.device) < counts).expand_as(scores)
    mask = torch.zeros_like(valid).scatter_(-1, newest_first, ranked)
    return mask.flip(-1) & valid
