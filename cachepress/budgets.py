"""Budgets: how many rows stay, and who competes for them."""

from dataclasses import dataclass
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from cachepress.core import LayerView
from cachepress.errors import CachepressError

_WINDOW = 2e38
_SINK = 3.4e38
_SINK_STEP = 1e32


@dataclass(frozen=True)
class TopK:
    """Each head keeps its best rows: floor(rows seen * (1 - ratio)), at least one.

    Attributes:
        ratio: fraction of rows removed, 0 <= ratio < 1, read as the decimal it is written as.
    """

    ratio: float

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def count(self, n_seen: Tensor) -> Tensor:
        """Rows that each head keeps, ``[B]``."""
        kept = 1 - Fraction(str(self.ratio))
        counts = [max(1, floor(n * kept)) for n in n_seen.tolist()]
        return torch.tensor(counts, device=n_seen.device)

    def select(self, scores: Tensor, view: LayerView) -> Tensor:
        """Keep mask ``[B, H, T]``; of equal scores the newest rows stay."""
        worst = torch.finfo(torch.float32).min
        scores = scores.float().nan_to_num(nan=worst, posinf=None, neginf=worst)
        scores = scores.masked_fill(~view.valid, float("-inf"))
        newest_first = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
        best = torch.arange(scores.shape[-1], device=scores.device) < view.n_kept[:, None, None]
        mask = torch.zeros_like(view.valid).scatter_(-1, newest_first, best.expand_as(scores))
        return mask.flip(-1) & view.valid


def check_ratio(ratio: float, name: str = "compression_ratio") -> None:
    """Raise unless ``ratio`` is a number with 0 <= ratio < 1."""
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not number or not 0 <= ratio < 1:
        raise CachepressError(
            f"{name} is the fraction of pairs removed: got {ratio!r}, wanted a number from 0 "
            "up to but not including 1"
        )


def pin_sinks(scores: Tensor, view: LayerView, n: int) -> Tensor:
    """Scores with the first ``n`` rows of each text above all others, the earliest highest.

    Pins are plain numbers above every sensible score (1e38), so that any budget honours them:
    sinks first, then the newest rows, however small the budget is.
    """
    pin = _SINK - _SINK_STEP * view.index.float()
    return torch.where(view.index < n, pin, scores.float())


def pin_window(scores: Tensor, view: LayerView, n: int) -> Tensor:
    """Scores with the last ``n`` rows of each text above every free row; ties go to the newest."""
    recent = view.index >= view.n_seen[:, None, None] - n
    return torch.where(recent, _WINDOW, scores.float())
