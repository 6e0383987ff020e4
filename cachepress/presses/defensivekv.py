"""DefensiveKV: the worst case of evicting a token, not the average."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.checks import check_count
from cachepress.ops import attention_weights, wide_dtype
from cachepress.press import ScorerPress
from cachepress.presses._scores import mean_of_token
from cachepress.presses.critical import projected_norms
from cachepress.presses.snapkv import check_kernel, in_window, pool
from cachepress.ranks import best, pin, pin_window
from cachepress.view import LayerView, Needs

_MASS = 0.9
"""Share of a head's attention that the first stage keeps."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class DefensiveKVPress(ScorerPress, alias="defensivekv"):
    """Keeps the tokens that any one of the last queries attends to most.

    Feng et al., "Taming the Fragility of KV Cache Eviction in LLM Inference" (arXiv:2510.13334), as
    in the code that they released. A token's risk is the most attention, averaged along the text,
    that it receives from a query of the window and a query head of its group; a risk below the mean
    risk of the head is raised to that mean, as a short window proves little. It is multiplied by
    the size of what the value adds to the layer's output, |v W_O|_1, as a share of what all heads
    add for that token. Before all others, as in CriticalKV, the tokens with the most mean attention
    are kept until these have 90 % of it, less the mean share of the ``window_size`` tokens before
    the window, and no more than the budget holds beside the window. Risk and mean leave out the
    tokens of the window, which stay. ``AdaKVPress(DefensiveKVPress(...))`` is the paper's method,
    and with ``scope="model"`` its Layer-DefensiveKV. Needs the last ``window_size`` queries and the
    output projection.
    Best for one prompt that must serve questions that are not yet known, with AdaKVPress around.

    Attributes:
        window_size: queries at the end of the prompt that vote; their own tokens always stay.
        kernel_size: tokens that attention is averaged over, an odd number.
    """

    window_size: int = 32
    kernel_size: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "window_size")
        check_kernel(self, self.kernel_size)

    @property
    def needs(self) -> Needs:
        """The queries of the window, and the output projection."""
        return Needs(queries=self.window_size, projection=True)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by risk times their share of the output, first stage above, ``[B, H, T]``."""
        free = view.valid & ~in_window(view, self.window_size)
        risk = self._risk(view, free)
        prior = (risk * free).sum(-1, keepdim=True) / free.sum(-1, keepdim=True).clamp(min=1)
        sizes = projected_norms(view)
        shares = sizes / (sizes.shape[1] * mean_of_token(sizes, view)).clamp(min=_TINY)
        scores = pin(torch.maximum(risk, prior) * shares * free, self._first_stage(view, free))
        return pin_window(scores, view, self.window_size)

    def _first_stage(self, view: LayerView, free: Tensor) -> Tensor:
        """Select the pairs that hold most of the mean attention, ``[B, H, T]``."""
        attention = view.window_attention(self.window_size) * free.unsqueeze(2)  # [B, H, G, T]
        age = free.flip(-1).cumsum(-1).flip(-1)  # 1 for the last token before the window
        near = (attention * (age <= self.window_size).unsqueeze(2)).sum(-1).mean((1, 2))  # [B]
        mean = attention.mean(2)
        mass = (mean / mean.sum(-1, keepdim=True).clamp(min=_TINY)).sort(-1, descending=True)
        reached = mass.values.cumsum(-1) >= (_MASS - near)[:, None, None]
        window = (view.valid & ~free).sum(-1, keepdim=True)  # [B, H, 1]
        room = view.n_kept[:, None, None].floor() - window
        return best(mean, free, torch.minimum((~reached).sum(-1, keepdim=True), room))

    def _risk(self, view: LayerView, free: Tensor) -> Tensor:
        """Take the most attention that each pair receives from one query, ``[B, H, T]``."""
        queries, t = view.last_queries(self.window_size), view.keys.shape[2]
        votes = view.voters[:, None, None, -self.window_size :, None]  # type: ignore
        free, risk = free[:, :, None, None], torch.zeros_like(view.valid, dtype=wide_dtype(queries))
        for some, found in attention_weights(queries, view.keys, view.valid, view.rule):
            weights = F.pad(found, (0, t - found.shape[-1])).mul_(votes[..., some, :] & free)
            smooth = pool(weights.flatten(2, 3), self.kernel_size, "avg").view_as(weights)
            smooth.mul_(free)
            # Attention that was smoothed beyond the ends of the text is given back.
            lost = weights.sum(-1, keepdim=True) / smooth.sum(-1, keepdim=True).clamp(min=_TINY)
            risk = torch.maximum(risk, smooth.mul_(lost).amax((2, 3)))
        return risk
