"""CapKV: tokens that add most to the information capacity of the cache."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.limits import MOST_POSITIONS
from cachepress.ops import cholesky, wide, wide_dtype
from cachepress.press import ScorerPress
from cachepress.ranks import pin_sinks
from cachepress.view import LayerView, Needs

_BLOCK = 1024


@dataclass(frozen=True)
class CapPress(ScorerPress, alias="cap"):
    """Keeps the tokens with the largest share in the information capacity of the cache.

    Yang et al., "Rethinking KV Cache Eviction via a Unified Information-Theoretic Objective"
    (CapKV, arXiv:2604.25975). A token weighs ``w = exp(tau cos(k, q))`` for the mean query ``q`` of
    the prompt; with ``A = I + sum w v v'`` over all tokens but the sinks, its score is
    ``w v' A^-1 v``, averaged over the query heads of a KV head. Needs the moments of the queries
    and the layer's rotary embedding.

    Chosen where the paper says nothing: key and query are normalised; the query is taken before
    RoPE and rotated by the average rotation of the positions to come; values stand for what a token
    adds to the layer's output.
    Best for contexts that say the same thing many times: of tokens with similar values few stay.

    Attributes:
        tau: how much the direction of the query counts; 0 for not at all.
        n_future_positions: positions after the prompt that the rotation is averaged over.
        n_sink: first tokens, which always stay and whose queries do not count.
        epsilon: least size of ``I`` against the largest weight, so that ``A`` can be inverted for
            every ``tau``; at the default it acts where ``tau cos(k, q)`` exceeds 13.8.
    """

    tau: float = 5.0
    n_future_positions: int = 512
    n_sink: int = 4
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "n_future_positions", most=MOST_POSITIONS)
        check_count(self, "n_sink", least=0)
        if not _is_number(self.tau) or not 0 <= self.tau < float("inf"):
            raise CachepressError(f"tau: got {self.tau!r}, wanted a number >= 0")
        if not _is_number(self.epsilon) or not 0 < self.epsilon < float("inf"):
            raise CachepressError(f"epsilon: got {self.epsilon!r}, wanted a number > 0")

    @property
    def needs(self) -> Needs:
        """The moments of the queries after the sinks."""
        return Needs(moments_after=self.n_sink)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by their share in the capacity, sinks above all others, ``[B, H, T]``."""
        free = view.valid & (view.index >= self.n_sink)
        logits = self.tau * self._alignment(view).double()  # [B, H, G, T]
        # NaN and infinity would spoil A for all other tokens: such a token is left out of it, and
        # is the first to be evicted.
        sizes = view.values.double().square().sum(-1)
        finite = free & sizes.isfinite() & logits.isfinite().all(2)
        logits = logits.masked_fill(~finite.unsqueeze(2), float("-inf"))
        # Both w and A are divided by the largest weight: the score is the same, without overflow.
        top = logits.amax(-1, keepdim=True).clamp(min=0)
        weights, identity = (logits - top).exp(), (-top).exp().clamp(min=self.epsilon)
        values = view.values.masked_fill(~finite.unsqueeze(-1), 0).unsqueeze(2)
        scores = weights * _leverage(values, weights, identity.unsqueeze(-1))
        scores = scores.mean(2).masked_fill(free & ~finite, float("nan"))
        return pin_sinks(scores.to(wide_dtype(view.keys)), view, self.n_sink)

    def _alignment(self, view: LayerView) -> Tensor:
        """Cosine of each key with the expected future query, ``[B, H, G, T]``."""
        if view.moments is None or view.rotary is None:
            raise TypeError("the view was made without moments of the queries")
        ahead = torch.arange(self.n_future_positions, device=view.keys.device)
        query = view.rotary.mean(view.moments.mean, view.next_position[:, None] + ahead)
        return F.normalize(query, dim=-1) @ F.normalize(wide(view.keys), dim=-1).mT


def _leverage(values: Tensor, weights: Tensor, identity: Tensor) -> Tensor:
    """Compute ``v' A^-1 v`` of ``values [B, H, 1, T, E]``, ``weights [B, H, G, T]``, in doubles.

    ``A`` is ``identity [B, H, G, 1, 1]`` times I, and the sum of ``w v v'``.
    """
    capacity = identity * torch.eye(values.shape[-1], dtype=torch.double, device=values.device)
    blocks = values.split(_BLOCK, dim=3)
    for v, w in zip(blocks, weights.split(_BLOCK, dim=-1), strict=True):
        capacity = capacity + (v.double() * w.unsqueeze(-1)).mT @ v.double()  # [B, H, G, E, E]
    inverse = torch.cholesky_inverse(cholesky(capacity))
    return torch.cat([((v.double() @ inverse) * v.double()).sum(-1) for v in blocks], dim=-1)


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
