"""LagKV: what stands out from the part of the text that follows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.ops import wide, wide_dtype
from cachepress.press import ScorerPress
from cachepress.ranks import pin, pin_sinks
from cachepress.view import LayerView


@dataclass(frozen=True)
class LagKVPress(ScorerPress, alias="lagkv"):
    """Keeps the rows whose keys and values spread most, measured by the part that follows.

    Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important"
    (arXiv:2504.04704). After the sinks the text is cut into parts of ``lag_size`` tokens. Each
    channel is scaled so that the rows of the next part span 0 to 1; a row's spread is the standard
    deviation over its channels, made a softmax over the rows of its part; keys and values count
    alike. The last whole part and what comes after it have nothing that follows: they always stay,
    newest first where the budget is too small. Needs nothing but keys and values.

    Chosen where the paper says nothing: a channel without range in the next part counts as 0; a
    part is scaled by itself where no row of the next one is left; rows of a part that was
    compressed before keep the places at the top of it, so that a further turn spares them.
    Best for long texts of one kind, prefilled without access to queries.

    Attributes:
        n_sink: first rows, which always stay.
        lag_size: tokens of a part.
        cross_scoring: whether parts compete by their softmax; otherwise by the places of rows
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
        """Mean spread of key and value or place by it, parts without a next pinned, [B, H, T]."""
        place = view.index.long() - self.n_sink  # [B, H, T]
        whole = (view.n_seen - self.n_sink).clamp(min=0) // self.lag_size  # [B]
        n = int(whole.max())
        inside = view.valid & (place >= 0) & (place < whole[:, None, None] * self.lag_size)
        tail = place >= (whole - 1).clamp(min=0)[:, None, None] * self.lag_size
        scores = torch.zeros_like(place, dtype=wide_dtype(view.keys))
        if n > 1:
            place = place.masked_fill(~inside, n * self.lag_size)
            spread = [_spread(x, place // self.lag_size, n) for x in (view.keys, view.values)]
            scores = self._shared_out(spread, place, n).masked_fill(~inside | tail, 0)
        return pin_sinks(pin(scores, tail), view, self.n_sink)

    def _shared_out(self, spread: list[Tensor], place: Tensor, n: int) -> Tensor:
        """The score of each row from its spreads ``[B, H, T]``, by place in the text."""
        shares = []
        for x in spread:
            table = x.new_full((*x.shape[:2], n * self.lag_size + 1), float("-inf"))
            parts = table.scatter(-1, place, x)[..., :-1].unflatten(-1, (n, self.lag_size))
            shares.append(parts.softmax(-1).masked_fill(parts.isinf(), -1))  # No row is lowest.
        total = torch.stack(shares).mean(0)  # [B, H, n, lag_size]
        if not self.cross_scoring:
            place_of = total.argsort(dim=-1, stable=True).argsort(dim=-1)
            total = place_of.to(total.dtype) / self.lag_size
        return total.flatten(2).gather(-1, place.clamp(max=n * self.lag_size - 1))


def _spread(x: Tensor, part: Tensor, n: int) -> Tensor:
    """Deviation over the channels of ``x [B, H, T, D]``, scaled by the part that follows.

    ``part [B, H, T]`` is the part of each row, of ``n``; ``n`` itself for a row in none.
    """
    x, each = wide(x), part.unsqueeze(-1).expand_as(x)
    empty = x.new_full((*x.shape[:2], n + 1, x.shape[-1]), float("inf"))
    low = empty.scatter_reduce(2, each, x, "amin")  # [B, H, n + 1, D]
    high = (-empty).scatter_reduce(2, each, x, "amax")
    left = low[:, :, 1:].isfinite()
    each = each.clamp(max=n - 1)
    low = torch.where(left, low[:, :, 1:], low[:, :, :-1]).gather(2, each)
    span = torch.where(left, high[:, :, 1:], high[:, :, :-1]).gather(2, each) - low
    return ((x - low) / span).masked_fill(span <= 0, 0).std(dim=-1)
