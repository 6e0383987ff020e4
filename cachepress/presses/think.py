"""ThinK: the channels of the keys that queries look at."""

from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import Self

import torch
from torch import Tensor

from cachepress.budgets import Ratio, TopK, check_fraction
from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.ops import wide
from cachepress.press import BasePress
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class _Left(TopK):
    """All rows that an earlier press left to each head, however many."""

    def select(self, scores: Tensor, valid: Tensor, n_kept: Tensor) -> Tensor:
        """Keep mask ``[B, H, T]``; a number of rows counts where nothing was dropped before."""
        left = valid & (scores > torch.finfo(torch.float32).min)
        dropped = (left != valid).any(-1).any(-1)[:, None, None]
        return torch.where(dropped, left, super().select(scores, valid, n_kept))


@dataclass(frozen=True)
class ThinKPress(BasePress, alias="think"):
    """Keeps every row, and of the keys of each head the channels that weigh most in attention.

    Xu et al., "ThinK: Thinner Key Cache by Query-Driven Pruning" (arXiv:2407.21018). A channel
    weighs |q_d| |k_d|: the norms of what the last queries and all kept keys have in it. The other
    channels are not stored. The paper leaves query heads that share keys open: here their squared
    norms are averaged. Values are whole, and so are keys that are decoded later. A later turn
    chooses anew; what older keys lost stays lost. It compresses what another press keeps in
    ``ComposedPress([SnapKVPress(0.5), ThinKPress(0.5)])``; in a DecodingPress put it first of the
    two, as the last press says which rows stay: by itself, the newest. Needs the last
    ``window_size`` queries.
    Best for saving a quarter of the memory on top of a press that drops rows.

    Attributes:
        key_channel_compression_ratio: fraction of the key channels removed, 0 <= ratio < 1; the
            number removed is rounded down. This is the ratio that ``with_ratio`` sets.
        window_size: queries at the end of the prompt that count.
    """

    key_channel_compression_ratio: float = 0.5
    window_size: int = 32

    def __post_init__(self) -> None:
        check_fraction(self.key_channel_compression_ratio, "key_channel_compression_ratio")
        if self.key_channel_compression_ratio == 1:
            raise CachepressError(
                "key_channel_compression_ratio: got 1, wanted less: a key without channels is none"
            )
        check_count(self, "window_size")

    @property
    def needs(self) -> Needs:
        """The queries of the window."""
        return Needs(queries=self.window_size, rewrites=self.key_channel_compression_ratio > 0)

    @property
    def budget(self) -> TopK:
        """All rows; heads that got different numbers of them from another press keep those."""
        return _Left(Ratio(0.0), scope="layer")

    def score(self, view: LayerView) -> Tensor:
        """The age of each row, for wrappers that drop some, ``[B, H, T]``."""
        return view.index.float()

    def key_channels(self, view: LayerView, mask: Tensor) -> Tensor | None:
        """The channels that weigh most, ``[B, H, D]``."""
        d = view.keys.shape[-1]
        removed = floor(d * Fraction(str(self.key_channel_compression_ratio)))
        if not removed:
            return None
        keys = (wide(view.keys).square() * mask.unsqueeze(-1)).sum(2)  # [B, H, D]
        order = (self._asked(view) * keys).argsort(dim=-1, descending=True, stable=True)
        chosen = torch.zeros_like(keys, dtype=torch.bool)
        return chosen.scatter(-1, order[..., : d - removed], True)

    def with_ratio(self, ratio: float) -> Self:
        """The same press at another ratio of key channels."""
        return replace(self, key_channel_compression_ratio=ratio)

    def _asked(self, view: LayerView) -> Tensor:
        """Squared norm of each channel over the window's queries, ``[B, H, D]``."""
        queries = wide(view.last_queries(self.window_size)).square()
        voters = view.voters[:, -self.window_size :]  # type: ignore
        norms = (queries * voters[:, None, None, :, None]).sum(-2).mean(2)
        # A sequence without a query in this turn is asked for all channels alike.
        return torch.where(voters.any(-1)[:, None, None], norms, 1.0)
