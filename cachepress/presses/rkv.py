"""R-KV: important tokens whose keys newer tokens do not repeat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.budgets import check_fraction
from cachepress.checks import check_count
from cachepress.ops import by_token, finite_directions, newest_similar, wide
from cachepress.press import ScorerPress
from cachepress.presses.snapkv import check_kernel, in_window, pool
from cachepress.ranks import pin_window
from cachepress.view import LayerView, Needs

_BLOCK = 1024
_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class RKVPress(ScorerPress, alias="rkv"):
    """Keeps tokens that the last queries attend to and that no newer token makes redundant.

    Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Training-Free Reasoning Models
    Acceleration" (arXiv:2505.24133). The score is mix_lambda * importance - (1 - mix_lambda) *
    redundancy. Importance: the highest logit of the query heads of a group, by softmax over the
    tokens before the window, mean over the window's queries, then the highest of the tokens around.
    Redundancy: the mean cosine of a token's key to those of all tokens held, by softmax over these;
    of the tokens similar to one token, the newest does not count its cosine to it, so of many
    similar ones the last stays. As in the authors' implementation the window's tokens count among
    the similar ones, and smoothing comes after the mean; where no token is similar to another, all
    cosines count. The model's attention sinks (``s_aux``) take their share of the softmax. Needs
    the last ``window_size`` queries. For each token the newest similar one is searched from the end
    of the text, which takes time that grows with the square of the number of tokens held where
    none are similar, and with that number where most are similar to one of the newest.
    Best for long reasoning that repeats itself, as ``DecodingPress(RKVPress())``.

    Attributes:
        window_size: last queries that vote; their own tokens always stay.
        kernel_size: tokens around over which importance is max-pooled, an odd number.
        mix_lambda: weight of importance, from 0 to 1.
        threshold: cosine above which two keys are similar.
    """

    window_size: int = 8
    kernel_size: int = 7
    mix_lambda: float = 0.1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "window_size")
        check_kernel(self, self.kernel_size)
        check_fraction(self.mix_lambda, "mix_lambda")
        check_fraction(self.threshold, "threshold")

    @property
    def needs(self) -> Needs:
        """The queries of the window."""
        return Needs(queries=self.window_size)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by importance less redundancy, ``[B, H, T]``."""
        importance = self._importance(view) * self.mix_lambda
        redundancy = self._redundancy(view) * (1 - self.mix_lambda)
        return pin_window(importance - redundancy, view, self.window_size)

    def _importance(self, view: LayerView) -> Tensor:
        free = (view.valid & ~in_window(view, self.window_size)).unsqueeze(2)  # [B, H, 1, T]
        voters = view.voters[:, None, -self.window_size :, None]  # type: ignore
        logits = _group_logits(view, view.last_queries(self.window_size), free)
        weights = logits.softmax(-1)[..., : free.shape[-1]] * (free & voters)  # [B, H, Q, T]
        mean = weights.sum(2, keepdim=True) / voters.sum(2, keepdim=True).clamp(min=1)
        return pool(mean, self.kernel_size, "max").squeeze(2)

    def _redundancy(self, view: LayerView) -> Tensor:
        """Softmax of each pair's mean cosine to all others, ``[B, H, T]``."""
        total = _total_cosines(view.keys, view.valid)
        cosine, newest = newest_similar(view.keys, view.valid, self.threshold)
        lost = cosine.double().masked_fill(newest < 0, 0)
        total.scatter_add_(-1, newest.clamp(min=0), -lost)
        mean = total / view.valid.sum(-1, keepdim=True).clamp(min=1)
        mean = mean.to(cosine.dtype).masked_fill(~view.valid, _LOWEST)
        return mean.softmax(-1)


def _total_cosines(keys: Tensor, valid: Tensor) -> Tensor:
    """Sum the cosines of each of ``keys [B, H, T, D]`` to all others, ``[B, H, T]``, in doubles."""
    # The cosines of a key to all others sum to one product with the sum of all: no T x T.
    everything = torch.zeros_like(keys[:, :, 0], dtype=torch.double)
    for block in zip(keys.split(_BLOCK, dim=2), valid.split(_BLOCK, dim=2), strict=True):
        everything += finite_directions(*block).double().sum(2)

    def total(keys: Tensor, valid: Tensor) -> Tensor:
        exact = finite_directions(keys, valid).double()
        return (exact @ everything.unsqueeze(-1)).squeeze(-1) - exact.square().sum(-1)

    return by_token(total, keys, valid)


def _group_logits(view: LayerView, queries: Tensor, free: Tensor) -> Tensor:
    """Take the highest logit of a group's heads, ``[B, H, Q, T]``, then the attention sink's."""
    rule = view.rule
    rows = (wide(queries) * rule.scaling).flatten(2, 3)  # [B, H, G * Q, D]

    def highest_of(keys: Tensor) -> Tensor:
        logits = (rows @ wide(keys).mT).unflatten(2, queries.shape[2:4])
        if rule.softcap is not None:
            logits = (logits / rule.softcap).tanh() * rule.softcap
        return logits.amax(2)

    highest = by_token(highest_of, view.keys).masked_fill(~free, _LOWEST)
    if rule.sinks is None:
        return highest
    sinks = wide(rule.sinks).view(1, *queries.shape[1:3], 1, 1).amax(2)  # [1, H, 1, 1]
    return torch.cat([highest, sinks.expand(*highest.shape[:3], 1)], dim=-1)
