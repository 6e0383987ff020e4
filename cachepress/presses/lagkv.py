"""LagKV: tokens that vary most relative to the part of the text that follows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.ops import blocks, by_token, gather, wide, wide_dtype
from cachepress.press import ScorerPress
from cachepress.ranks import pin, pin_sinks
from cachepress.view import LayerView


@dataclass(frozen=True)
class LagKVPress(ScorerPress, alias="lagkv"):
    """Keeps the tokens whose keys and values vary most, relative to the part of text that follows.

    Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important"
    (arXiv:2504.04704). After the sinks the text is cut into parts of ``lag_size`` tokens. Each
    channel is scaled so that the tokens of the next part span 0 to 1; a token's spread is the
    standard deviation over its channels, by softmax over the tokens of its part; keys and values
    count alike. The last whole part and what comes after it have nothing that follows: they always
    stay, newest first where the budget is too small. Needs nothing but keys and values.

    Chosen where the paper says nothing: a channel without range in the next part counts as 0; a
    part is scaled by itself where no token of the next one is held; tokens of a part that was
    compressed before rank at the top of it, so that a later compression spares them.
    Best for long texts of one kind, prefilled without access to queries.

    Attributes:
        n_sink: first tokens, which always stay.
        lag_size: tokens of a part.
        cross_scoring: whether parts compete by their softmax; otherwise by the ranks of tokens
            within their part, so that all parts keep about as many.
    """

    n_sink: int = 4
    lag_size: int = 128
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "n_sink", least=0)
        check_count(self, "lag_size")
        if not isinstance(self.cross_scoring, bool):
            raise CachepressError(
                f"cross_scoring: got {self.cross_scoring!r}, wanted True or False"
            )

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by spread or its rank, parts without a next one pinned, ``[B, H, T]``."""
        offset = view.index.long() - self.n_sink  # [B, H, T]
        whole = (view.n_seen - self.n_sink).clamp(min=0) // self.lag_size  # [B]
        n = max(0, view.longest() - self.n_sink) // self.lag_size
        inside = view.valid & (offset >= 0) & (offset < whole[:, None, None] * self.lag_size)
        tail = offset >= (whole - 1).clamp(min=0)[:, None, None] * self.lag_size
        scores = torch.zeros_like(offset, dtype=wide_dtype(view.keys))
        if n > 1:
            offset = offset.masked_fill(~inside, n * self.lag_size)
            spread = [_spread(x, offset // self.lag_size, n) for x in (view.keys, view.values)]
            scores = self._within_part(spread, offset, n).masked_fill(~inside | tail, 0)
        return pin_sinks(pin(scores, tail), view, self.n_sink)

    def _within_part(self, spread: list[Tensor], offset: Tensor, n: int) -> Tensor:
        """Compare spreads ``[B, H, T]`` within each part, by offset in the text from the sinks."""
        shares = []
        for x in spread:
            text = x.new_full((*x.shape[:2], n * self.lag_size + 1), float("-inf"))
            parts = text.scatter(-1, offset, x)[..., :-1].unflatten(-1, (n, self.lag_size))
            shares.append(
                parts.softmax(-1).masked_fill(parts.isinf(), -1)
            )  # Evicted ones rank lowest.
        total = torch.stack(shares).mean(0)  # [B, H, n, lag_size]
        if not self.cross_scoring:
            # The sort of a sort is its inverse permutation: the rank of each token in its part.
            rank = total.argsort(dim=-1, stable=True).argsort(dim=-1)
            total = rank.to(total.dtype) / self.lag_size
        return total.flatten(2).gather(-1, offset.clamp(max=n * self.lag_size - 1))


def _spread(x: Tensor, part: Tensor, n: int) -> Tensor:
    """Deviation over the channels of ``x [B, H, T, D]``, scaled by the part that follows.

    ``part [B, H, T]`` is the part of each pair, of ``n``; ``n`` itself for a pair in none.
    """
    low, high = _ranges(x, part, n)
    # The next part's range, or the part's own where every token of the next one was evicted.
    held = low[:, :, 1:].isfinite()
    low, high = (torch.where(held, y[:, :, 1:], y[:, :, :-1]) for y in (low, high))

    def spread(x: Tensor, part: Tensor) -> Tensor:
        part = part.clamp(max=n - 1)
        least = gather(low, part)
        span = gather(high, part).sub_(least)
        return (wide(x) - least).div_(span).masked_fill_(span <= 0, 0).std(dim=-1)

    return by_token(spread, x, part)


def _ranges(x: Tensor, part: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest number of each channel in the parts 0 to ``n``, ``[B, H, n + 1, D]``.

    Where a part has no pair, the lowest number is infinity and the highest minus infinity.
    """
    b, h, t, d = x.shape
    low = x.new_full((b, h, n + 1, d), float("inf"), dtype=wide_dtype(x))
    high = -low
    for some in blocks(t, b * h * d):
        new, each = wide(x[:, :, some]), part[:, :, some, None].expand(-1, -1, -1, d)
        low.scatter_reduce_(2, each, new, "amin")
        high.scatter_reduce_(2, each, new, "amax")
    return low, high
