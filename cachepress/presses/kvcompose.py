"""KVCompose: each head takes its own best rows, and layers compete for how many."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cachepress.budgets import TopK
from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.ops import attention_weights, wide, wide_dtype
from cachepress.press import ScorerPress
from cachepress.presses._reconstructing import replayed_or_carried
from cachepress.presses._scores import mean_of_token, unknown_as_average
from cachepress.presses.chunkkv import highest_first, places
from cachepress.ranks import pin
from cachepress.reconstruction import Reconstruction, ReconstructionView
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class _Composites(TopK):
    """The composite tokens with the highest scores: the i-th rows of all heads of a layer."""

    def count(self, view: LayerView) -> Tensor:
        """Rows that each head keeps on average, ``[B]``."""
        return super().count(view).clamp(min=1)

    def select(self, scores: Tensor, valid: Tensor, n_kept: Tensor) -> Tensor:
        """Keep mask ``[B, H, T]``; every head of a layer keeps as many rows."""
        order = highest_first(wide(scores).masked_fill(~valid, float("-inf")))
        ranked, held = wide(scores).gather(-1, order), valid.gather(-1, order)
        # By rank first, so that equal composites are taken whole: their heads stand side by side.
        table = ranked.masked_fill(~held, float("-inf")).mT.flatten(1)
        best = table.argsort(dim=-1, descending=True, stable=True)
        heads = valid.shape[1]
        total = n_kept.double().view(len(n_kept), -1, 1).expand(-1, heads, -1).sum(1).round()
        taken = (torch.arange(best.shape[-1], device=best.device) < total).expand_as(best)
        taken = torch.zeros_like(taken).scatter(-1, best, taken).unflatten(-1, (-1, heads)).mT
        return torch.zeros_like(valid).scatter(-1, order, taken & held)


@dataclass(frozen=True)
class KVComposePress(ScorerPress, alias="kvcompose"):
    """Lets layers compete with composite tokens: the best rows of all heads, the second best, ...

    Akulov et al., "KVCompose: Efficient Structured KV Cache Compression with Composite Tokens"
    (arXiv:2509.05165). The prompt is read once more behind itself, and a row is worth the attention
    that it receives from that second reading; what the first one shows of it is how near it stood
    to others. Each head ranks its own rows; the i-th composite is worth what the heads' i-th rows
    are, and the best composites of the whole model stay, so that all heads of a layer keep the same
    number of rows. Rows of an earlier turn keep their worth, decoded ones count as average. Costs a
    further prefill, twice its keys and values for as long, and time that grows with the square of
    the prompt, as attention itself does.
    Best for servers that need the same number of rows in all heads of a layer.

    Attributes:
        structured: whether rows compete as composites; if not, every row for itself in the whole
            model, so that each head keeps its own number.
        agg_task: over the queries of the second reading, "max" for the most attention from one of
            them, or "mean".
        agg_group: over the query heads of a KV head, "mean" or "max".
        agg_head: over the KV heads of a composite, "mean" or "max".
        add_v_norm: whether a row's worth is multiplied by the norm of its value.
        add_mean_across_heads: whether the mean worth of the token in all KV heads that hold it is
            added.
        keep_token_lower_bound: rows that every head keeps while the budget holds them; one in any
            case where rows compete as composites.
        chunk_size: tokens that are read a second time in one forward; it bounds memory, and does
            not change what is kept.
    """

    structured: bool = True
    agg_task: str = "max"
    agg_group: str = "mean"
    agg_head: str = "mean"
    add_v_norm: bool = False
    add_mean_across_heads: bool = True
    keep_token_lower_bound: int = 0
    chunk_size: int = field(default=2048, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("agg_task", "agg_group", "agg_head"):
            if getattr(self, name) not in ("max", "mean"):
                raise CachepressError(
                    f'{name}: got {getattr(self, name)!r}, wanted "max" or "mean"'
                )
        check_count(self, "keep_token_lower_bound", least=0)
        check_count(self, "chunk_size")

    @property
    def needs(self) -> Needs:
        """The whole prompt behind itself, unless nothing will be evicted; scores are kept."""
        if self.with_ratio(0.0) == self:
            return Needs()
        whole = Reconstruction(self.chunk_size, 0, "", "", whole=True)
        return Needs(reconstruction=whole, token_state=True)

    def reconstructed(self, view: ReconstructionView) -> Tensor:
        """Attention that each row received so far by query head; at last by head, ``[H, T]``."""
        shape = *view.queries.shape[1:3], view.chunk.stop - view.chunk.start
        received = view.keys.new_zeros(shape, dtype=wide_dtype(view.keys))  # [H, G, T]
        if view.before is not None:
            received = view.before
        for _, weights in attention_weights(view.queries, view.keys, view.valid, view.rule):
            new = weights[0, ..., view.chunk]  # [H, G, q, T]
            if self.agg_task == "max":
                received = torch.maximum(received, new.amax(-2))
            else:
                received = received + new.sum(-2)
        if not view.last:
            return received
        if self.agg_task == "mean":
            # Each token of the text was a query once.
            received = received / view.valid[0, :, None, view.chunk].sum(-1, keepdim=True)
        return received.amax(1) if self.agg_group == "max" else received.mean(1)

    def token_state(self, view: LayerView) -> Tensor:
        """Attention that each row received in the second reading of its turn, ``[B, H, T]``."""
        return replayed_or_carried(view)

    @property
    def budget(self) -> TopK:
        """The best composites, or rows, of the whole model."""
        kind = _Composites if self.structured else TopK
        return kind(self.amount, scope="model")

    def score(self, view: LayerView) -> Tensor:
        """What the row's composite is worth, or the row itself, ``[B, H, T]``."""
        scores = self._worth(view)
        order = highest_first(scores.masked_fill(~view.valid, -1.0))
        ranks, least = places(order), self.keep_token_lower_bound
        if self.structured:
            held, least = view.valid.gather(-1, order), max(1, least)
            composites = _over_heads(scores.gather(-1, order), held, self.agg_head)
            scores = composites.expand_as(scores).gather(-1, ranks)
        return pin(scores, ranks < least)

    def _worth(self, view: LayerView) -> Tensor:
        """What each row is worth to its own head, ``[B, H, T]``."""
        worth = unknown_as_average(self.token_state(view), view.valid)
        if self.add_v_norm:
            worth = worth * wide(view.values).norm(dim=-1)
        return worth + mean_of_token(worth, view) if self.add_mean_across_heads else worth


def _over_heads(x: Tensor, held: Tensor, how: str) -> Tensor:
    """Mean or maximum of ``x [B, H, T]`` over the heads that have a row there, ``[B, 1, T]``."""
    if how == "max":
        return x.masked_fill(~held, 0.0).amax(1, keepdim=True)
    return (x * held).sum(1, keepdim=True) / held.sum(1, keepdim=True).clamp(min=1)
