"""KVCompose: each head keeps its own best tokens, and layers compete for how many."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cachepress.budgets import TopK
from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.ops import attention_column_peaks, attention_column_sums, norms, wide, wide_dtype
from cachepress.press import ScorerPress
from cachepress.presses._reconstructing import reconstructed_or_state
from cachepress.presses._scores import mean_of_token, nan_as_average
from cachepress.presses.chunkkv import highest_first, inverse_order
from cachepress.ranks import pin
from cachepress.reconstruction import Reconstruction, ReconstructionView
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class _Composites(TopK):
    """The best composite tokens, each made of what all heads of a layer have at one rank."""

    def count(self, view: LayerView) -> Tensor:
        """Pairs that each head keeps on average, ``[B]``."""
        return super().count(view).clamp(min=1)

    def select(self, scores: Tensor, valid: Tensor, n_kept: Tensor) -> Tensor:
        """Keep mask ``[B, H, T]``; every head of a layer keeps the same number of pairs."""
        order = highest_first(wide(scores).masked_fill(~valid, float("-inf")))
        ranked, held = wide(scores).gather(-1, order), valid.gather(-1, order)
        # By rank first, heads side by side: all heads of a composite have its score, and a stable
        # sort then takes equal composites one by one, each of them whole.
        composites = ranked.masked_fill(~held, float("-inf")).mT.flatten(1)
        best = composites.argsort(dim=-1, descending=True, stable=True)
        heads = valid.shape[1]
        total = n_kept.double().view(len(n_kept), -1, 1).expand(-1, heads, -1).sum(1).round()
        taken = (torch.arange(best.shape[-1], device=best.device) < total).expand_as(best)
        taken = torch.zeros_like(taken).scatter(-1, best, taken).unflatten(-1, (-1, heads)).mT
        return torch.zeros_like(valid).scatter(-1, order, taken & held)


@dataclass(frozen=True)
class KVComposePress(ScorerPress, alias="kvcompose"):
    """Keeps each head's own best tokens, the same number in all heads of a layer; layers compete.

    Akulov et al., "KVCompose: Efficient Structured KV Cache Compression with Composite Tokens"
    (arXiv:2509.05165). The prompt is fed once more behind itself, and a token's score is the
    attention that it receives from this second pass; attention in the first one mostly shows how
    near a token stood to others. Each head ranks its own tokens; a composite token is what all
    heads of a layer have at the same rank, its score is theirs, and the best composites of the
    whole model stay, so that all heads of a layer keep the same number of pairs. Tokens of an
    earlier prompt keep their scores, decoded ones count as average. Costs a further prefill, twice
    its keys and values for as long, and time that grows with the square of the prompt, as attention
    itself does.
    Best for servers that need the same number of pairs in all heads of a layer.

    Attributes:
        structured: whether composites compete; if not, every pair for itself in the whole model,
            so that each head keeps its own number.
        agg_task: over the queries of the second pass, "max" for the most attention from one of
            them, or "mean".
        agg_group: over the query heads of a KV head, "mean" or "max".
        agg_head: over the KV heads of a composite, "mean" or "max".
        add_v_norm: whether a score is multiplied by the norm of the value.
        add_mean_across_heads: whether the mean score of the token in all KV heads that hold it is
            added.
        keep_token_lower_bound: tokens that every head keeps while the budget holds them; one in
            any case where composites compete.
        chunk_size: tokens of the second pass in one forward; it bounds memory, and does
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
        """The prompt fed once more behind itself, unless nothing is evicted; scores are kept."""
        if self.with_ratio(0.0) == self:
            return Needs()
        whole = Reconstruction(self.chunk_size, 0, "", "", whole=True)
        return Needs(reconstruction=whole, token_state=True)

    def reconstructed(self, view: ReconstructionView) -> Tensor:
        """Aggregate the attention that each token receives, ``[H, T]``.

        Before the last chunk by query head, ``[H, G, T]``: groups are aggregated only at the end,
        because mean and maximum cannot be swapped.
        """
        every = view.keys.new_ones(1, view.queries.shape[3], dtype=wide_dtype(view.keys))
        inputs = view.queries, view.keys, view.valid, every, view.rule
        most = self.agg_task == "max"
        reduced = attention_column_peaks if most else attention_column_sums
        received = reduced(*inputs, columns=view.chunk)[0]  # [H, G, T]
        if view.before is not None:
            joined = torch.maximum if most else torch.add
            received = joined(received, view.before)
        if not view.last:
            return received
        if self.agg_task == "mean":
            # Each token of the text was a query once.
            received = received / view.valid[0, :, None, view.chunk].sum(-1, keepdim=True)
        return received.amax(1) if self.agg_group == "max" else received.mean(1)

    def token_state(self, view: LayerView) -> Tensor:
        """Attention that each pair received in the second pass of its prompt, ``[B, H, T]``."""
        return reconstructed_or_state(view)

    @property
    def budget(self) -> TopK:
        """The best composites, or pairs, of the whole model."""
        kind = _Composites if self.structured else TopK
        return kind(self.amount, scope="model")

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by their composite, or by themselves, ``[B, H, T]``."""
        scores = self._importance(view)
        order = highest_first(scores.masked_fill(~view.valid, -1.0))
        ranks, least = inverse_order(order), self.keep_token_lower_bound
        if self.structured:
            # From text order to rank and, with the inverse permutation, back again.
            held, least = view.valid.gather(-1, order), max(1, least)
            composites = _over_heads(scores.gather(-1, order), held, self.agg_head)
            scores = composites.expand_as(scores).gather(-1, ranks)
        return pin(scores, ranks < least)

    def _importance(self, view: LayerView) -> Tensor:
        """Score each pair for its own head, ``[B, H, T]``."""
        scores = nan_as_average(self.token_state(view), view.valid)
        if self.add_v_norm:
            scores = scores * norms(view.values)
        return scores + mean_of_token(scores, view) if self.add_mean_across_heads else scores


def _over_heads(x: Tensor, held: Tensor, how: str) -> Tensor:
    """Mean or maximum of ``x [B, H, T]`` over the heads that hold a pair there, ``[B, 1, T]``."""
    if how == "max":
        return x.masked_fill(~held, 0.0).amax(1, keepdim=True)
    return (x * held).sum(1, keepdim=True) / held.sum(1, keepdim=True).clamp(min=1)
