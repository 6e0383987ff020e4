"""Non-causal attention: what a passage looks at when it may look ahead."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.checks import check_count
from cachepress.ops import wide, wide_dtype
from cachepress.press import ScorerPress
from cachepress.view import EVERY, LayerView, Needs


@dataclass(frozen=True)
class NonCausalAttnPress(ScorerPress, alias="noncausal"):
    """Keeps the rows that their own passage attends to, looking back and ahead.

    Chari and Van Durme, "Compactor: Calibrated Query-Agnostic KV Cache Compression with
    Approximate Leverage Scores" (arXiv:2507.08143), the attention half. The text is cut into
    chunks; every query attends to all rows of its chunk, by the softmax of plain query-key
    products without the layer's scaling. A row's sum over the queries, averaged over the query
    heads of a KV head, is multiplied by the norm of the value and averaged with both neighbours.
    Needs all queries.

    Chosen where the paper says nothing: what a row received stays with it, and queries of a later
    turn that fall into its chunk add to it; a row whose queries nobody saw counts as average, 1.
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
        """Attention that each row received so far, ``[B, H, T]``."""
        queries, voters = view.last_queries(EVERY), view.voters
        assert voters is not None
        new = F.pad(voters, (view.valid.shape[-1] - voters.shape[1], 0))  # [B, T]
        before = (~new[:, None]).float().expand(view.valid.shape)
        if view.token_state is not None:
            before = torch.where(view.token_state.isnan(), before, wide(view.token_state))
        return before + self._received(view, queries, voters)

    def score(self, view: LayerView) -> Tensor:
        """Attention times the value's norm, smoothed and standardised, ``[B, H, T]``."""
        worth = self.token_state(view) * wide(view.values).norm(dim=-1)
        smooth = F.avg_pool1d(worth.masked_fill(~view.valid, 0), 3, stride=1, padding=1)
        return standardised(smooth, view.valid)

    def _received(self, view: LayerView, queries: Tensor, voters: Tensor) -> Tensor:
        """Attention from this turn's queries, ``[B, H, T]``, one block of queries at a time.

        A row and a query of the same chunk are less than a chunk apart in the table too.
        """
        size, (t, q) = self.chunk_size, (view.keys.shape[2], queries.shape[-2])
        chunk = view.index.div(size, rounding_mode="floor")  # [B, H, T]
        sums = torch.zeros_like(view.valid, dtype=wide_dtype(view.keys))
        for start in range(0, q, size):
            stop = min(start + size, q)
            own = slice(t - q + start, t - q + stop)
            near = slice(max(0, own.start - size + 1), min(t, own.stop + size - 1))
            same = chunk[:, :, own, None] == chunk[:, :, None, near]  # [B, H, n, m]
            same = (same & view.valid[:, :, None, near]).unsqueeze(2)
            logits = wide(queries[..., start:stop, :]) @ wide(view.keys[:, :, None, near]).mT
            shares = logits.masked_fill(~same, torch.finfo(torch.float32).min).softmax(-1)
            votes = same & voters[:, None, None, start:stop, None]
            sums[..., near] += (shares * votes).sum(-2).mean(2)
        return sums


def standardised(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores ``[B, H, T]`` with mean 0 and deviation 1 over the valid rows of a sequence.

    All heads together, so that they can still be compared, and in doubles, so that the result does
    not depend on the order of a sum. Rows that are not valid get 0; what is not finite is left out,
    and stays as it is.
    """
    known = valid & scores.isfinite()
    x = scores.double().masked_fill(~known, 0)
    count = known.sum((1, 2), keepdim=True)
    centred = x - x.sum((1, 2), keepdim=True) / count.clamp(min=1)
    centred = centred.masked_fill(~known, 0)
    variance = centred.square().sum((1, 2), keepdim=True) / (count - 1).clamp(min=1)
    found = (centred / variance.sqrt().clamp(min=1e-6)).to(wide_dtype(scores))
    return torch.where(valid & ~known, scores.to(found.dtype), found)
