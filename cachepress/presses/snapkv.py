"""SnapKV: what the end of the prompt looks at."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from cachepress.budgets import pin_window
from cachepress.errors import CachepressError
from cachepress.presses.base import ScorerPress, check_count
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class SnapKVPress(ScorerPress, alias="snapkv"):
    """Keeps the rows that the last queries of the prompt attend to, and those queries' own rows.

    Li et al., "SnapKV: LLM Knows What You Are Looking for Before Generation" (arXiv:2404.14469).
    Needs the last ``window_size`` queries; attention is averaged over them, smoothed along the
    text by average pooling, and averaged over the query heads of a KV head.

    Attributes:
        window_size: queries at the end of the prompt that vote; their rows always stay.
        kernel_size: rows that the smoothing averages over, an odd number.
    """

    window_size: int = 64
    kernel_size: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "window_size")
        check_count(self, "kernel_size")
        if self.kernel_size % 2 == 0:
            raise CachepressError(f"kernel_size: got {self.kernel_size}, wanted an odd number")

    @property
    def needs(self) -> Needs:
        """The queries of the window."""
        return Needs(queries=self.window_size)

    def score(self, view: LayerView) -> Tensor:
        """Smoothed attention from the window, ``[B, H, T]``."""
        votes = view.window_attention(self.window_size).mean(2)  # [B, H, T]
        votes[..., -view.last_queries(self.window_size).shape[-2] :] = 0
        smooth = F.avg_pool1d(votes, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return pin_window(smooth, view, self.window_size)
