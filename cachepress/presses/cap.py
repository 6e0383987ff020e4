"""CapKV: tokens that add most to the information capacity of the cache."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.limits import MOST_POSITIONS
from cachepress.ops import blocks, by_token, cholesky, quadratic_forms, wide, wide_dtype
from cachepress.press import ScorerPress
from cachepress.ranks import pin_sinks
from cachepress.view import LayerView, Needs


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
        free, cosines = view.valid & (view.index >= self.n_sink), self._alignment(view)
        # NaN and infinity would spoil A for all other tokens: such a token is left out of it, and
        # is the first to be evicted.
        finite = free & _finite(view.values) & cosines.isfinite().all(2)
        cosines.masked_fill_(~finite.unsqueeze(2), -1)
        # Both w and A are divided by the largest weight: the score is the same, without overflow.
        top = (self.tau * cosines.amax(-1, keepdim=True).double()).clamp(min=0)  # [B, H, G, 1]
        identity = (-top).exp().clamp(min=self.epsilon)
        parts = list(blocks(finite.shape[-1], cosines[..., 0].numel() * view.values.shape[-1]))

        def weighed(some: slice) -> tuple[Tensor, Tensor]:
            """Weights ``[B, H, G, n]`` and values ``[B, H, n, E]`` of some tokens, in doubles."""
            weights, real = (self.tau * cosines[..., some].double() - top).exp(), finite[..., some]
            values = view.values[:, :, some].double().masked_fill(~real.unsqueeze(-1), 0)
            return weights * real.unsqueeze(2), values

        capacity = _capacity(map(weighed, parts), identity.unsqueeze(-1))
        inverse = torch.cholesky_inverse(cholesky(capacity))
        shares = [(w * quadratic_forms(v, inverse)).mean(2) for w, v in map(weighed, parts)]
        scores = torch.cat(shares, dim=-1).masked_fill(free & ~finite, float("nan"))
        return pin_sinks(scores.to(wide_dtype(view.keys)), view, self.n_sink)

    def _alignment(self, view: LayerView) -> Tensor:
        """Cosine of each key with the expected future query, ``[B, H, G, T]``."""
        if view.moments is None or view.rotary is None:
            raise TypeError("the view was made without moments of the queries")
        ahead = torch.arange(self.n_future_positions, device=view.keys.device)
        query = view.rotary.mean(view.moments.mean, view.next_position[:, None] + ahead)
        query = F.normalize(query, dim=-1)
        return by_token(lambda keys: query @ F.normalize(wide(keys), dim=-1).mT, view.keys)


def _finite(values: Tensor) -> Tensor:
    """Tell which of ``values [B, H, T, E]`` have a finite norm, in doubles, ``[B, H, T]``."""
    return by_token(lambda v: v.double().square().sum(-1).isfinite(), values)


def _capacity(weighed: Iterable[tuple[Tensor, Tensor]], identity: Tensor) -> Tensor:
    """Sum ``identity [B, H, G, 1, 1]`` times I and w v v', ``[B, H, G, E, E]``.

    Args:
        weighed: weights ``[B, H, G, n]`` and values ``[B, H, n, E]``, block by block.
        identity: how much of I there is.
    """
    sums = None
    for w, v in weighed:
        columns = (w.mT.unsqueeze(-1) * v.unsqueeze(-2)).flatten(3)  # [B, H, n, G * E]
        new = (v.mT @ columns).unflatten(-1, (w.shape[2], v.shape[-1]))  # [B, H, E, G, E]
        sums = new if sums is None else sums + new
    assert sums is not None
    return sums.transpose(2, 3) + identity * torch.eye(
        sums.shape[-1], dtype=sums.dtype, device=sums.device
    )


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
