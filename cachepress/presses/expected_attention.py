"""Expected attention: what future queries are expected to attend to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.limits import MOST_POSITIONS
from cachepress.ops import by_token, norms, quadratic_forms, wide
from cachepress.press import ScorerPress
from cachepress.ranks import pin_sinks
from cachepress.view import LayerView, Moments, Needs


@dataclass(frozen=True)
class ExpectedAttentionPress(ScorerPress, alias="expected_attention"):
    """Keeps the tokens that future queries are expected to attend to.

    Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future
    Queries Distribution" (arXiv:2510.00636). Queries before RoPE are taken as Gaussian with the
    moments of the prompt's own queries; rotated by the average rotation of the positions to come,
    the expectation of ``exp(q k)`` has a closed form. Needs the moments of the queries and the
    layer's rotary embedding. Best for contexts that are compressed before anything is asked.

    Attributes:
        n_future_positions: positions after the prompt that the rotation is averaged over.
        n_sink: first tokens, which always stay and whose queries do not count.
        use_covariance: whether the covariance of the queries enters.
        use_vnorm: whether the score is multiplied by the norm of the value.
        epsilon: added to the score before that multiplication.
    """

    n_future_positions: int = 512
    n_sink: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "n_future_positions", most=MOST_POSITIONS)
        check_count(self, "n_sink", least=0)
        if not isinstance(self.epsilon, int | float) or self.epsilon < 0:
            raise CachepressError(f"epsilon: got {self.epsilon!r}, wanted a number >= 0")

    @property
    def needs(self) -> Needs:
        """The moments of the queries after the sinks."""
        return Needs(moments_after=self.n_sink)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by expected attention times the value's norm, ``[B, H, T]``."""
        logits = self._expected_logits(view)  # [B, H, G, T]
        free = view.valid & (view.index >= self.n_sink)
        lowest = torch.finfo(logits.dtype).min
        scores = logits.masked_fill_(~free.unsqueeze(2), lowest).softmax(-1).mean(2)
        if self.use_vnorm:
            scores = (scores + self.epsilon) * norms(view.values)
        return pin_sinks(scores, view, self.n_sink)

    def moments(self, view: LayerView) -> Moments:
        """Return the moments of the queries to come."""
        if view.moments is None:
            raise TypeError("the view was made without moments of the queries")
        return view.moments

    def _expected_logits(self, view: LayerView) -> Tensor:
        if view.rotary is None:
            raise TypeError("the view was made without the rotary embedding")
        moments = self.moments(view)
        ahead = torch.arange(self.n_future_positions, device=view.keys.device)
        future = view.next_position[:, None] + ahead  # [B, n]
        mean = view.rotary.mean(moments.mean, future) * view.rule.scaling  # [B, H, G, D]
        if not self.use_covariance:
            return by_token(lambda keys: mean @ wide(keys).mT, view.keys)
        # R C R' for the mean rotation R, which is applied to one side at a time.
        half = view.rotary.mean(moments.covariance, future)
        covariance = view.rotary.mean(half.mT, future) * (view.rule.scaling**2 / 2)

        def logits(keys: Tensor) -> Tensor:
            keys = wide(keys)
            return mean @ keys.mT + quadratic_forms(keys, covariance)

        return by_token(logits, view.keys, each=mean.numel())
