"""SnapKV: tokens that the end of the prompt attends to."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.press import ScorerPress
from cachepress.ranks import pin_window
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class SnapKVPress(ScorerPress, alias="snapkv"):
    """Keeps the tokens that the last queries of the prompt attend to most, and those last tokens.

    Li et al., "SnapKV: LLM Knows What You Are Looking for Before Generation" (arXiv:2404.14469).
    Needs the last ``window_size`` queries; attention is averaged over them, smoothed along the
    text by pooling, and averaged over the query heads of a KV head.
    Best for prompts that end with the question.

    Attributes:
        window_size: queries at the end of the prompt that vote; their own tokens always stay.
        kernel_size: tokens that the smoothing pools, an odd number.
        pooling: "avg" for the mean of those tokens, "max" for the highest.
    """

    window_size: int = 64
    kernel_size: int = 5
    pooling: str = field(default="avg", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "window_size")
        check_kernel(self, self.kernel_size)
        if self.pooling not in ("avg", "max"):
            raise CachepressError(f'pooling: got {self.pooling!r}, wanted "avg" or "max"')

    @property
    def needs(self) -> Needs:
        """The queries of the window."""
        return Needs(queries=self.window_size)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by smoothed attention from the window, ``[B, H, T]``."""
        votes = view.window_attention(self.window_size)  # [B, H, G, T]
        votes = votes.masked_fill(in_window(view, self.window_size).unsqueeze(2), 0)
        smooth = pool(votes, self.kernel_size, self.pooling).mean(2)
        return pin_window(smooth, view, self.window_size)


def check_kernel(press: ScorerPress, size: int) -> None:
    """Raise unless ``size``, the press's ``kernel_size``, is an odd number."""
    check_count(press, "kernel_size")
    if size % 2 == 0:
        raise CachepressError(f"kernel_size: got {size}, wanted an odd number")


def in_window(view: LayerView, n: int) -> Tensor:
    """Mask the tokens of the last ``n`` queries of the forward, ``[B, 1, T]``.

    Fewer than ``n`` where a sequence had fewer new tokens.
    """
    if view.voters is None:
        raise TypeError("the press did not declare queries in its needs")
    t = view.valid.shape[-1]
    age = torch.arange(t - 1, -1, -1, device=view.valid.device)
    return age < view.voters[:, -n:].sum(-1)[:, None, None]


def pool(x: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """Smooth ``x [B, H, G, T]`` along the text, which zeros surround."""
    reach = min(kernel_size, max(2 * x.shape[-1] - 1, 1))  # What is farther away is zero.
    pooled = F.max_pool1d if pooling == "max" else F.avg_pool1d
    smooth = pooled(x.flatten(0, 1), reach, stride=1, padding=reach // 2).view_as(x)
    return smooth if pooling == "max" or reach == kernel_size else smooth * (reach / kernel_size)
