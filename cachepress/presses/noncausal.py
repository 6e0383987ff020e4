"""Non-causal attention: tokens that their own passage attends to, back and ahead."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.checks import check_count
from cachepress.ops import blocks, norms, wide, wide_dtype
from cachepress.press import ScorerPress
from cachepress.view import EVERY, LayerView, Needs

_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class NonCausalAttnPress(ScorerPress, alias="noncausal"):
    """Keeps the tokens that their own passage attends to most, without the causal mask.

    Chari and Van Durme, "Compactor: Calibrated Query-Agnostic KV Cache Compression with
    Approximate Leverage Scores" (arXiv:2507.08143), the attention half. The text is cut into
    chunks; every query attends to all tokens of its chunk, by the softmax of plain query-key
    products without the layer's scaling. A token's sum over the queries, averaged over the query
    heads of a KV head, is multiplied by the norm of the value and averaged with both neighbours.
    Needs all queries.

    Chosen where the paper says nothing: the sum is kept with its token, and queries of a later
    forward that fall into its chunk add to it; a token whose queries were not observed counts as
    average, 1.
    Best for text that will be asked about in ways that the prompt does not say.

    Attributes:
        chunk_size: tokens of a chunk, counted from the start of the text.
    """

    chunk_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "chunk_size")

    @property
    def needs(self) -> Needs:
        """All queries; scores are kept, because the queries are gone at the next compression."""
        return Needs(queries=EVERY, token_state=True)

    def token_state(self, view: LayerView) -> Tensor:
        """Attention that each pair received so far, ``[B, H, T]``."""
        queries, voters = view.last_queries(EVERY), view.voters
        assert voters is not None
        new = F.pad(voters, (view.valid.shape[-1] - voters.shape[1], 0))  # [B, T]
        before = (~new[:, None]).float().expand(view.valid.shape)
        if view.token_state is not None:
            before = torch.where(view.token_state.isnan(), before, wide(view.token_state))
        return before + self._received(view, queries, voters)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by attention times value norm, smoothed, standardised, ``[B, H, T]``."""
        weighted = self.token_state(view) * norms(view.values)
        smooth = F.avg_pool1d(weighted.masked_fill(~view.valid, 0), 3, stride=1, padding=1)
        return standardised(smooth, view.valid)

    def _received(self, view: LayerView, queries: Tensor, voters: Tensor) -> Tensor:
        """Sum the attention of this forward's queries, ``[B, H, T]``, block by block.

        A key and a query of the same chunk are less than a chunk apart among the held pairs too,
        because eviction only brings them closer: a block needs no keys beyond that.
        """
        size, (b, h, g, q, _), t = self.chunk_size, queries.shape, view.keys.shape[2]
        chunk = view.index.div(size, rounding_mode="floor")  # [B, H, T]
        sums = torch.zeros_like(view.valid, dtype=wide_dtype(view.keys))
        for some in blocks(q, b * h * g * 3 * size, most=size):
            own = slice(t - q + some.start, t - q + some.stop)
            near = slice(max(0, own.start - size + 1), min(t, own.stop + size - 1))
            other = chunk[:, :, own, None] != chunk[:, :, None, near]  # [B, H, n, m]
            other = (other | ~view.valid[:, :, None, near]).unsqueeze(2)
            logits = wide(queries[..., some, :]).flatten(2, 3) @ wide(view.keys[:, :, near]).mT
            logits = logits.unflatten(2, (g, -1)).masked_fill_(other, _LOWEST)
            # A query that sees no token of its chunk any more has equal shares, which mean nothing.
            shares = logits.softmax(-1).masked_fill_(other, 0)
            votes = voters[:, None, None, None, some].to(shares.dtype)
            sums[..., near] += (votes @ shares).squeeze(-2).mean(2)
        return sums


def standardised(scores: Tensor, valid: Tensor) -> Tensor:
    """Standardise ``scores [B, H, T]`` to mean 0 and deviation 1 over a sequence's valid pairs.

    All heads together, so that they can still be compared, and in doubles, so that the result does
    not depend on the order of a sum. Pairs that are not valid get 0; what is not finite is left
    out, and stays as it is.
    """
    finite = valid & scores.isfinite()
    x = scores.double().masked_fill(~finite, 0)
    count = finite.sum((1, 2), keepdim=True)
    centred = x - x.sum((1, 2), keepdim=True) / count.clamp(min=1)
    centred = centred.masked_fill(~finite, 0)
    variance = centred.square().sum((1, 2), keepdim=True) / (count - 1).clamp(min=1)
    standard = (centred / variance.sqrt().clamp(min=1e-6)).to(wide_dtype(scores))
    return torch.where(valid & ~finite, scores.to(standard.dtype), standard)
