"""TriAttention: expected logits of the mean query at growing distances."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.ops import by_token, wide, wide_dtype
from cachepress.press import ScorerPress
from cachepress.ranks import pin_sinks, pin_window
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class TriAttentionPress(ScorerPress, alias="triattention"):
    """Keeps the tokens that the mean query before RoPE would attend to from future positions.

    Mao et al., "TriAttention: Efficient Long Reasoning with Trigonometric KV Compression"
    (arXiv:2604.04921). Of a key at distance d, band f of the rotary embedding adds |E q_f| |k_f|
    cos(omega_f d + phi_f), here as the product of the rotated mean query and the rotated key, the
    mean over the distances from the last token plus 1, 2, 4, ... up to ``max_distance``; and (1 -
    R_f) E|q_f| |k_f|, where R_f = |E q_f| / E|q_f| says how close the queries stay to their mean.
    Each query head's scores are brought to mean 0 and deviation 1 over the tokens that are not
    pinned, and a token gets the highest of its group. The paper measures queries on other texts
    beforehand, and E|q_f|; here they are those of the prompt, and E|q_f| is the root of their mean
    square. Distances are reached by squaring the rotation by one position, so that the rotary
    embedding is never asked for a position that the model has not reached. Needs the moments of the
    queries and the layer's rotary embedding.
    Best for long reasoning, as ``DecodingPress(TriAttentionPress())``.

    Attributes:
        window_size: newest tokens, which always stay.
        n_sink: first tokens, which always stay and whose queries do not count.
        max_distance: the largest distance of a future query from the last token.
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
        """Score pairs by expected logits, standardised in each query head, ``[B, H, T]``."""
        newest = view.index >= view.n_seen[:, None, None] - self.window_size
        free = view.valid & (view.index >= self.n_sink) & ~newest
        scores = _standard(self._logits(view), free.unsqueeze(2)).amax(2)
        return pin_sinks(pin_window(scores, view, self.window_size), view, self.n_sink)

    def _logits(self, view: LayerView) -> Tensor:
        """Expected logits of each query head, without the scaling, ``[B, H, G, T]``."""
        if view.moments is None:
            raise TypeError("the view was made without moments of the queries")
        rotation = _Rotation.of(view, self.max_distance)
        mean = wide(view.moments.mean)
        square = mean.square() + view.moments.covariance.diagonal(dim1=-2, dim2=-1)
        size, reach = rotation.norms(square), rotation.norms(mean.square())  # [B, H, G, D]
        # (1 - R_f) E|q_f| is E|q_f| - |E q_f|.
        spread = (size - reach) * rotation.weight
        centred = mean @ rotation.now.unsqueeze(1) @ rotation.ahead

        def logits(keys: Tensor) -> Tensor:
            keys = wide(keys)
            return centred @ keys.mT + spread @ rotation.norms(keys.square()).mT

        return by_token(logits, view.keys)


class _Rotation(NamedTuple):
    """The layer's rotary embedding as matrices, each applied as ``x @ matrix``.

    Attributes:
        now: ``[B, D, D]`` to the position of the last token.
        ahead: ``[D, D]`` mean of the rotations to the distances from there.
        band: ``[D, D]`` 1 where two channels rotate together, else 0.
        weight: ``[D]`` what lengths are multiplied by, over the number of the band's channels.
    """

    now: Tensor
    ahead: Tensor
    band: Tensor
    weight: Tensor

    @classmethod
    def of(cls, view: LayerView, farthest: int) -> "_Rotation":
        """Find those of the view's layer, for the distances 1, 2, 4, ... up to ``farthest``."""
        if view.rotary is None:
            raise TypeError("the view was made without the rotary embedding")
        d, last = view.keys.shape[-1], (view.next_position - 1).clamp(min=0)
        # The rotated unit vectors are the embedding's matrix, whatever its layout of channels.
        unit = torch.eye(d, dtype=wide_dtype(view.keys), device=last.device)
        unit = unit.repeat(2, 1).expand(len(last), -1, -1)
        # Both in one call: some embeddings depend on the highest position that they are given.
        positions = torch.stack([torch.ones_like(last), last], 1).repeat_interleave(d, 1)
        step, now = view.rotary(unit, positions).chunk(2, dim=1)
        step = step[0].double()  # Rounding grows with every distance.
        # Some embeddings scale as well as rotate (YaRN): squaring must not scale again and again.
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
        """Norm of each channel's band, from the channels' squares, ``[B, H, n, D]``."""
        return (squares @ self.band).clamp(min=0).sqrt()


def _standard(x: Tensor, free: Tensor) -> Tensor:
    """Standardise ``x`` to mean 0 and deviation 1 over ``free``, both ``[..., T]``."""
    count = free.sum(-1, keepdim=True).clamp(min=1)
    mean = (x * free).sum(-1, keepdim=True) / count
    centred = (x - mean) * free
    deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    return centred / deviation.clamp(min=1e-6)
