"""ThinK: the key channels that weigh most in attention."""

from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import Self

import torch
from torch import Tensor

from cachepress.budgets import Ratio, TopK, check_fraction
from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.ops import blocks, wide, wide_dtype
from cachepress.press import BasePress
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class _AllPairs(TopK):
    """Keeps all pairs, or those that an earlier press keeps in each head."""

    def select(self, scores: Tensor, valid: Tensor, n_kept: Tensor) -> Tensor:
        """Keep mask ``[B, H, T]``; the budget counts only where nothing was evicted before."""
        # An earlier press of a ComposedPress gives the pairs that it evicts the lowest score.
        held = valid & (scores > torch.finfo(torch.float32).min)
        evicted = (held != valid).any(-1).any(-1)[:, None, None]
        return torch.where(evicted, held, super().select(scores, valid, n_kept))


@dataclass(frozen=True)
class ThinKPress(BasePress, alias="think"):
    """Keeps every token, and of each head's keys only the channels that weigh most in attention.

    Xu et al., "ThinK: Thinner Key Cache by Query-Driven Pruning" (arXiv:2407.21018). A channel
    weighs |q_d| |k_d|: the norms of what the last queries and all kept keys have in it. The other
    channels are not stored. The paper leaves query heads that share keys open: here their squared
    norms are averaged. Values are whole, and so are keys that are decoded later. A later prompt
    chooses anew; channels that older keys lost stay lost. It compresses what another press keeps in
    ``ComposedPress([SnapKVPress(0.5), ThinKPress(0.5)])``; in a DecodingPress put it first of the
    two, as the last press says which tokens stay: by itself, the newest. Needs the last
    ``window_size`` queries.
    Best for saving a quarter of the memory on top of a press that evicts tokens.

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
        """All pairs, or what an earlier press keeps in each head."""
        return _AllPairs(Ratio(0.0), scope="layer")

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by index, for wrappers that evict some, ``[B, H, T]``."""
        return view.index.float()

    def key_channels(self, view: LayerView, mask: Tensor) -> Tensor | None:
        """Select the key channels that weigh most, ``[B, H, D]``."""
        d = view.keys.shape[-1]
        removed = floor(d * Fraction(str(self.key_channel_compression_ratio)))
        if not removed:
            return None
        norms = self._query_norms(view)
        order = (norms * _key_norms(view.keys, mask)).argsort(dim=-1, descending=True, stable=True)
        chosen = torch.zeros_like(order, dtype=torch.bool)
        return chosen.scatter(-1, order[..., : d - removed], True)

    def with_ratio(self, ratio: float) -> Self:
        """Return the press at another ratio of key channels."""
        return replace(self, key_channel_compression_ratio=ratio)

    def _query_norms(self, view: LayerView) -> Tensor:
        """Squared norm of each channel over the window's queries, ``[B, H, D]``."""
        queries = wide(view.last_queries(self.window_size)).square()
        voters = view.voters[:, -self.window_size :]  # type: ignore
        norms = (queries * voters[:, None, None, :, None]).sum(-2).mean(2)
        # A sequence without a query in this forward weighs all channels alike.
        return torch.where(voters.any(-1)[:, None, None], norms, 1.0)


def _key_norms(keys: Tensor, mask: Tensor) -> Tensor:
    """Squared norm of each channel of the keys in ``mask [B, H, T]``, ``[B, H, D]``."""
    b, h, t, d = keys.shape
    total = keys.new_zeros(b, h, 1, d, dtype=wide_dtype(keys))
    for some in blocks(t, b * h * d):
        total += mask[:, :, None, some].to(total.dtype) @ wide(keys[:, :, some]).square()
    return total.squeeze(2)
