"""R-KV: important tokens whose keys newer tokens do not repeat."""

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.budgets import check_fraction
from cachepress.checks import check_count
from cachepress.ops import wide
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
        keys = F.normalize(wide(view.keys), dim=-1).masked_fill(~view.valid.unsqueeze(-1), 0)
        keys = keys.nan_to_num(nan=0.0)  # A key that is not finite is similar to none.
        exact = keys.double()
        # The cosines of a key to all others sum to one product with the sum of all: no T x T.
        total = (exact @ exact.sum(2).unsqueeze(-1)).squeeze(-1) - exact.square().sum(-1)
        for b, h in product(*map(range, view.valid.shape[:2])):
            newest, cosine = _newest_similar(keys[b, h], self.threshold)
            total[b, h].index_add_(0, newest, -cosine.double())
        mean = total / view.valid.sum(-1, keepdim=True).clamp(min=1)
        mean = mean.to(keys.dtype).masked_fill(~view.valid, _LOWEST)
        return mean.softmax(-1)


def _newest_similar(keys: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Find the newest other key that is similar to each of ``keys [T, D]``, and the cosine.

    Keys that are similar to none are missing from both results.
    """
    pending = torch.arange(len(keys), device=keys.device)
    found = []
    stop, size = len(keys), _BLOCK
    while stop and len(pending):
        start = max(0, stop - size)
        column = torch.arange(start, stop, device=keys.device)
        missed = []
        for some in pending.split(_BLOCK):
            cosine = keys[some] @ keys[start:stop].mT
            similar = (cosine > threshold) & (some[:, None] != column)
            newest = torch.where(similar, column, -1).amax(-1)
            hit = newest >= 0
            own = cosine.gather(-1, (newest - start).clamp(min=0)[:, None])[:, 0]
            found.append((newest[hit], own[hit]))
            missed.append(some[~hit])
        pending, stop = torch.cat(missed), start
        # Where few keys are pending, many columns fit into the same memory.
        size = _BLOCK * max(1, _BLOCK // max(1, len(pending)))
    newest, cosine = zip((pending[:0], keys[:0, 0]), *found, strict=True)
    return torch.cat(newest), torch.cat(cosine)


def _group_logits(view: LayerView, queries: Tensor, free: Tensor) -> Tensor:
    """Take the highest logit of a group's heads, ``[B, H, Q, T]``, then the attention sink's."""
    rule = view.rule
    logits = (wide(queries) * rule.scaling) @ wide(view.keys).unsqueeze(2).mT
    if rule.softcap is not None:
        logits = (logits / rule.softcap).tanh() * rule.softcap
    highest = logits.amax(2).masked_fill(~free, _LOWEST)
    if rule.sinks is None:
        return highest
    sinks = wide(rule.sinks).view(1, *queries.shape[1:3], 1, 1).amax(2)  # [1, H, 1, 1]
    return torch.cat([highest, sinks.expand(*highest.shape[:3], 1)], dim=-1)
