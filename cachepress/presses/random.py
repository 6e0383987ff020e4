"""Random eviction: the baseline that every method has to beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.press import ScorerPress
from cachepress.view import LayerView

_WRAP = 1 << 64


def _signed(x: int) -> int:
    """Convert a 64-bit constant to the signed integer that torch can hold."""
    return x - _WRAP if x >= _WRAP // 2 else x


@dataclass(frozen=True)
class RandomPress(ScorerPress, alias="random"):
    """Keeps random tokens, different ones in every layer and head, the same ones in every run.

    A token's score depends on the seed, the layer, the head and the token's index in its own text
    only, so padding, neighbours in a batch and chunks do not change it. Best for a baseline that
    every method has to beat.

    Attributes:
        seed: another seed gives another choice.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "seed", least=0)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by uniform random numbers from 0 to 1, ``[B, H, T]``."""
        heads = torch.arange(view.keys.shape[1], device=view.keys.device)[:, None]
        x = _mix(torch.full((), self.seed, device=view.keys.device))
        x = _mix(x + view.layer)
        x = _mix(_mix(x + heads) + view.index.long())
        return (x & 0xFFFFFF).float() / 0x1000000


def _mix(x: Tensor) -> Tensor:
    """Hash by the finaliser of SplitMix64 (Steele et al., 2014), in wrapping integers."""
    x = x + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift(x, shift)) * _signed(factor)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, n: int) -> Tensor:
    """Shift right without the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)
