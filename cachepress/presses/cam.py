"""CaM: values evicted while decoding are merged into the tokens after them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.checks import check_count
from cachepress.ops import blocks, gather, known_counts
from cachepress.press import BasePress
from cachepress.presses._checks import either, fill
from cachepress.presses.decoding import DecodingPress
from cachepress.presses.random import RandomPress
from cachepress.view import LayerView, Needs

_STREAM = 0x43614D
"""Keeps the draws apart from those of a RandomPress inside."""


@dataclass(frozen=True)
class CAMPress(DecodingPress, alias="cam"):
    """Merges the values of tokens evicted while decoding into the kept tokens after them.

    Zhang et al., "CaM: Cache Merging for Memory-efficient LLMs Inference" (ICML 2024, openreview
    LCTmppB165). A ``DecodingPress``; the merge window of an evicted token is the next
    ``merge_budget`` kept tokens of its head, fewer at the end of the text. With probability
    ``min(1, a / mean of a over the window)`` each of them gets an equal share of its value, by a
    draw that depends on the seed, the layer, the head and the token's index only. As in the paper
    ``a`` is the attention that a token received in total, whatever the inner press scores by; the
    mean of the query heads of a KV head, the prompt's queries included, and of the decoded ones
    those that the buffer holds. It is kept with each token, unless the inner press keeps a state of
    its own: then ``a`` counts the queries since the last compression. ``compression_interval=1`` is
    the paper's algorithm, which evicts a token with every decoded one; with more, all tokens that
    are evicted at once are merged. Needs what the inner press needs, the attention sums, and 4
    bytes with each pair (8 in float64).
    Best for small targets, where much attention falls on tokens that are evicted.

    Attributes:
        press: the press that scores; its own ratio does not count.
        compression_interval: decoded tokens between two compressions.
        target_size: pairs that each head keeps, on average where heads compete.
        hidden_states_buffer_size: most decoded queries that a score can use.
        merge_budget: kept tokens that share the value of an evicted one.
        seed: another seed gives other draws.
    """

    merge_budget: int = 32
    seed: int = 0

    def __init__(
        self,
        press: BasePress | None = None,
        compression_interval: int = 512,
        target_size: int = 2048,
        hidden_states_buffer_size: int = 256,
        merge_budget: int = 32,
        seed: int = 0,
        *,
        base_press: BasePress | None = None,
    ) -> None:
        """Take ``base_press``, kvpress's name, for ``press``, too."""
        values = {
            "press": either("press", press, "base_press", base_press),
            "compression_interval": compression_interval,
            "target_size": target_size,
            "hidden_states_buffer_size": hidden_states_buffer_size,
            "merge_budget": merge_budget,
            "seed": seed,
        }
        fill(self, values)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "merge_budget")
        check_count(self, "seed", least=0)

    @property
    def needs(self) -> Needs:
        """What the inner press needs, and the attention received by each token so far."""
        return super().needs | Needs(attention_sums=True, token_state=True)

    def token_state(self, view: LayerView) -> Tensor | None:
        """The inner press's state of each pair, or the attention received, ``[B, H, T]``."""
        return (
            self.press.token_state(view) if self.press.needs.token_state else self._received(view)
        )

    def merge(self, view: LayerView, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """Merge the shares of evicted values into kept ones; keys stay as they are."""
        merged, evicted = self.press.merge(view, mask), view.valid & ~mask
        if not any(known_counts(evicted.sum(), 1)):
            return merged
        keys, values = (view.keys, view.values) if merged is None else merged
        windows = _Windows.of(mask, self.merge_budget)
        return keys, windows.merge(values, evicted & self._drawn(view, mask, windows))

    def _drawn(self, view: LayerView, mask: Tensor, windows: "_Windows") -> Tensor:
        """Draw whose value is shared if it is evicted, ``[B, H, T]``."""
        received = self._received(view)
        so_far = (received.double() * mask).cumsum(-1)
        total = windows.last(so_far) - so_far
        odds = received * windows.size / total.clamp(min=torch.finfo(torch.float32).tiny)
        return RandomPress(seed=self.seed + _STREAM).score(view) < odds

    def _received(self, view: LayerView) -> Tensor:
        """Sum the attention received so far, ``[B, H, T]``."""
        if view.attention_sums is None:
            raise TypeError("the view was made without attention sums")
        received = view.attention_sums.mean(2)
        if view.token_state is None or self.press.needs.token_state:
            return received
        return received + view.token_state.nan_to_num(nan=0.0)


@dataclass(frozen=True)
class _Windows:
    """The merge windows of the tokens of a layer: the next kept tokens of their head.

    Attributes:
        kept: ``[B, H, T]`` bool.
        rank: ``[B, H, T]`` how many of the tokens so far are kept, this one included.
        column: ``[B, H, T + 1]`` one more than the column of the kept token of each rank; 0 of rank
            0, and of ranks that no token has.
        reach: the most tokens of a window.
    """

    kept: Tensor
    rank: Tensor
    column: Tensor
    reach: int

    @classmethod
    def of(cls, kept: Tensor, reach: int) -> "_Windows":
        """Find the windows of at most ``reach`` tokens among the ``kept [B, H, T]``."""
        rank, count = kept.cumsum(-1), torch.arange(1, kept.shape[-1] + 1, device=kept.device)
        column = rank.new_zeros(*kept.shape[:2], kept.shape[-1] + 1)
        # Tokens that are not kept write to rank 0, which stays 0.
        column = column.scatter_reduce(-1, rank * kept, count * kept, "amax")
        return cls(kept, rank, column, reach)

    @property
    def size(self) -> Tensor:
        """Number of tokens in the window of each token that is not kept, ``[B, H, T]``."""
        return (self.rank[..., -1:] - self.rank).clamp(max=self.reach)

    def last(self, x: Tensor) -> Tensor:
        """Look up ``x [B, H, T]`` at the last token of each token's window; 0 where it has none."""
        end = self.column.gather(-1, self.rank + self.size)
        return F.pad(x, (1, 0)).gather(-1, end)

    def merge(self, values: Tensor, some: Tensor) -> Tensor:
        """Share ``values [B, H, T, E]`` of ``some`` tokens among their windows, and clear them."""
        # Windows overlap: a kept token gets what began after the token that is ``reach`` kept ones
        # before it, up to itself, a difference of two running sums. Windows that are shorter end
        # with the text, so that the same difference is right for them.
        before = self.column.gather(-1, (self.rank - self.reach).clamp(min=0))
        size, merged = self.size.clamp(min=1).double(), torch.empty_like(values)
        some = some & (self.size > 0)
        for channels in blocks(values.shape[-1], 2 * some.numel()):
            own = values[..., channels].double()
            shares = own.masked_fill(~some.unsqueeze(-1), 0) / size.unsqueeze(-1)
            so_far = F.pad(shares.cumsum(2), (0, 0, 1, 0))
            gained = so_far[:, :, 1:] - gather(so_far, before)
            gained.masked_fill_(~self.kept.unsqueeze(-1), 0)
            merged[..., channels] = own.masked_fill(some.unsqueeze(-1), 0) + gained
        return merged
