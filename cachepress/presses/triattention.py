"""TriAttention: what queries around their usual centre will see from farther and farther away."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.ops import wide, wide_dtype
from cachepress.press import ScorerPress
from cachepress.ranks import pin_sinks, pin_window
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class TriAttentionPress(ScorerPress, alias="triattention"):
    """Keeps the rows that the average query before RoPE would attend to from positions to come.

    Mao et al., "TriAttention: Efficient Long Reasoning with Trigonometric KV Compression"
    (arXiv:2604.04921). Of a key at distance d, band f of the rotary embedding adds |E q_f| |k_f|
    cos(omega_f d + phi_f), here as the product of the rotated mean query and the rotated key, the
    mean over the distances from the last token plus 1, 2, 4, ... up to ``max_distance``; and (1 -
    R_f) E|q_f| |k_f|, where R_f = |E q_f| / E|q_f| says how close the queries stay to their mean.
    Each query head's scores are brought to mean 0 and deviation 1 over the rows that are not
    pinned, and a row gets the highest of its group. The paper measures queries on other texts
    beforehand, and E|q_f|; here they are those of the turn, and E|q_f| is the root of their mean
    square. Distances are reached by repeated turns of the smallest one, so that no position is
    asked for that the model has not reached. Needs the moments of the queries and the layer's
    rotary embedding.
    Best for long reasoning, as ``DecodingPress(TriAttentionPress())``.

    Attributes:
        window_size: newest rows, which always stay.
        n_sink: first rows, which always stay and whose queries do not count.
        max_distance: the farthest that a future query is looked at from.
    """

    window_size: int = 128
    n_sink: int = 4
    max_distance: int = 65536

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "window_size", least=0)
        check_count(self, "n_sink", least=0)
        check_count(self, "max_distance")

    @property
    def needs(self) -> Needs:
        """The moments of the queries after the sinks, and the rotary embedding."""
        return Needs(moments_after=self.n_sink, rotary=True)

    def score(self, view: LayerView) -> Tensor:
        """Expected logits in deviations of their head, ``[B, H, T]``."""
        newest = view.index >= view.n_seen[:, None, None] - self.window_size
        free = view.valid & (view.index >= self.n_sink) & ~newest
        scores = _standard(self._logits(view), free.unsqueeze(2)).amax(2)
        return pin_sinks(pin_window(scores, view, self.window_size), view, self.n_sink)

    def _logits(self, view: LayerView) -> Tensor:
        """Expected logits of each query head, without the scaling, ``[B, H, G, T]``."""
        if view.moments is None:
            raise TypeError("the view was made without moments of the queries")
        turns = _Turns.of(view, self.max_distance)
        mean, keys = wide(view.moments.mean), wide(view.keys)
        square = mean.square() + view.moments.covariance.diagonal(dim1=-2, dim2=-1)
        size, reach = turns.norms(square), turns.norms(mean.square())  # [B, H, G, D]
        spread = (size - reach) * turns.weight
        centred = mean @ turns.now.unsqueeze(1) @ turns.ahead
        return centred @ keys.mT + spread @ turns.norms(keys.square()).mT


class _Turns(NamedTuple):
    """The layer's rotary embedding as matrices that rows are multiplied by.

    Attributes:
        now: ``[B, D, D]`` to the position of the last token.
        ahead: ``[D, D]`` mean of the turns to the distances from there.
        band: ``[D, D]`` 1 where two channels turn together, else 0.
        weight: ``[D]`` what lengths are multiplied by, over the number of the band's channels.
    """

    now: Tensor
    ahead: Tensor
    band: Tensor
    weight: Tensor

    @classmethod
    def of(cls, view: LayerView, farthest: int) -> "_Turns":
        """Those of the view's layer, for the distances 1, 2, 4, ... up to ``farthest``."""
        if view.rotary is None:
            raise TypeError("the view was made without the rotary embedding")
        d, last = view.keys.shape[-1], (view.next_position - 1).clamp(min=0)
        unit = torch.eye(d, dtype=wide_dtype(view.keys), device=last.device)
        unit = unit.repeat(2, 1).expand(len(last), -1, -1)
        # Both in one call: some embeddings depend on the highest position that they are given.
        positions = torch.stack([torch.ones_like(last), last], 1).repeat_interleave(d, 1)
        step, now = view.rotary(unit, positions).chunk(2, dim=1)
        step = step[0].double()  # Rounding grows with every distance.
        length = step.norm(dim=-1, keepdim=True)
        step = step / length
        ahead, band = torch.zeros_like(step), torch.zeros_like(step)
        count = farthest.bit_length()
        for _ in range(count):
            ahead, band = ahead + step / count, band.maximum((step != 0).double())
            step = step @ step
        weight = length.squeeze(-1) / band.sum(-1)
        return cls(now, *(x.to(now.dtype) for x in (ahead, band, weight)))

    def norms(self, squares: Tensor) -> Tensor:
        """Norm of each channel's band from the channels' squares, ``[B, H, n, D]``."""
        return (squares @ self.band).clamp(min=0).sqrt()


def _standard(x: Tensor, rows: Tensor) -> Tensor:
    """``x`` with mean 0 and deviation 1 over ``rows``, both ``[..., T]``."""
    count = rows.sum(-1, keepdim=True).clamp(min=1)
    mean = (x * rows).sum(-1, keepdim=True) / count
    centred = (x - mean) * rows
    deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    return centred / deviation.clamp(min=1e-6)
