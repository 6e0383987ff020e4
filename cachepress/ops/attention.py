"""Attention sums for scoring: grouped, so that keys are never repeated for their queries.

Shape letters are those of ``cachepress.view``. The rows of a table end with the rows of its
queries, so causality only ever touches the last Q columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from cachepress.ops.precision import wide, wide_dtype

_BYTES = 1 << 24
"""Bytes of the weights that are in memory at once."""
_ROWS = 128
"""Queries of a head beyond which larger products gain nothing."""
_HAS_TRITON = find_spec("triton") is not None
_HAS_WIDE_PRODUCTS = hasattr(torch.ops.aten.bmm, "dtype")


@dataclass(frozen=True)
class AttentionRule:
    """Scaling, soft cap and sinks by which a layer turns query-key products into attention weights.

    Attributes:
        scaling: factor on the products.
        softcap: products are squashed to ``softcap * tanh(x / softcap)``; None for not at all.
        sinks: ``[H * G]`` a logit per query head that takes weight but belongs to no row.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def logits(self, products: Tensor) -> Tensor:
        """Scale and cap products of queries with keys."""
        scaled = products * self.scaling
        return scaled if self.softcap is None else (scaled / self.softcap).tanh() * self.softcap


def attention_column_sums(
    queries: Tensor,
    keys: Tensor,
    valid: Tensor | None,
    counted: Tensor,
    rule: AttentionRule,
    block: int | None = None,
    columns: slice = slice(None),
) -> Tensor:
    """Sum the attention that each row receives over the queries, without a matrix of weights.

    Args:
        queries: ``[B, H, G, Q, D]`` of the last Q rows.
        keys: ``[B, H, T, D]``.
        valid: ``[B, H, T]`` bool, which rows can be attended to; None where all can.
        counted: ``[B, Q]`` how much each query counts.
        rule: the layer's rule.
        block: queries whose weights are in memory at once; None for as many as memory is set aside.
        columns: the rows that are asked for.

    Returns:
        ``[B, H, G, T]`` in float32, of the rows that are asked for; in float64 of float64.
    """
    return _reduced(queries, keys, valid, counted, rule, block, columns, peaks=False)


def attention_column_peaks(
    queries: Tensor,
    keys: Tensor,
    valid: Tensor | None,
    counted: Tensor,
    rule: AttentionRule,
    block: int | None = None,
    columns: slice = slice(None),
) -> Tensor:
    """Find the most attention that each row receives from one query, times what it counts.

    Arguments and shapes are those of ``attention_column_sums``; no query counts less than 0.
    """
    return _reduced(queries, keys, valid, counted, rule, block, columns, peaks=True)


def attention_weights(
    queries: Tensor,
    keys: Tensor,
    valid: Tensor | None,
    rule: AttentionRule,
    block: int | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Iterate over attention weights, one block of queries at a time.

    Args:
        queries: ``[B, H, G, Q, D]`` of the last Q rows.
        keys: ``[B, H, T, D]``.
        valid: ``[B, H, T]`` bool, which rows can be attended to; None where all can.
        rule: the layer's rule.
        block: queries per block; None for as many as memory is set aside.

    Yields:
        Which queries, and their weights ``[B, H, G, q, t]`` over the first ``t`` rows, those that
        the last of them can see; memory that may be written to.
    """
    b, h, g, q, _ = queries.shape
    t = keys.shape[2]
    rows = block or _fitting(b * h * g * t * wide_dtype(keys).itemsize, min(q, _ROWS))
    everything = slice(None), slice(None)
    for start in range(0, q, rows):
        stop = min(start + rows, q)
        part = _Block(*everything, slice(start, stop), t - q + stop)
        yield part.queries, part.weights(queries, keys, valid, rule)


def _reduced(
    queries: Tensor,
    keys: Tensor,
    valid: Tensor | None,
    counted: Tensor,
    rule: AttentionRule,
    block: int | None,
    columns: slice,
    peaks: bool,
) -> Tensor:
    """Reduce the attention to each row over the queries, ``[B, H, G, T]``."""
    votes = counted.to(wide_dtype(keys))
    if keys.is_cuda and _HAS_TRITON and keys.dtype.itemsize == 2:
        from cachepress.ops.column_kernel import Attention

        attention = Attention(queries, keys, valid, rule)
        return attention.peaks(votes, columns) if peaks else attention.sums(votes, columns)
    b, h, g, *_ = queries.shape
    first, stop, _ = columns.indices(keys.shape[2])
    reduced = votes.new_zeros(b, h, g, max(0, stop - first))
    for part in _blocks(queries, keys, block):
        weights = part.weights(queries, keys, valid, rule)[..., first:stop]
        here = reduced[part.sequences, part.heads, :, : weights.shape[-1]]
        own = votes[part.sequences, None, None, None, part.queries]  # [B, 1, 1, 1, q]
        if peaks:
            torch.maximum(here, weights.mul_(own.mT).amax(-2), out=here)
        else:
            here += (own @ weights).squeeze(-2)
    return reduced


class _Block(NamedTuple):
    """Weights that are in memory at once: of which sequences, KV heads and queries.

    Attributes:
        sequences: which sequences.
        heads: which KV heads.
        queries: which queries.
        end: rows that the last of these queries can see.
    """

    sequences: slice
    heads: slice
    queries: slice
    end: int

    def weights(
        self, queries: Tensor, keys: Tensor, valid: Tensor | None, rule: AttentionRule
    ) -> Tensor:
        """Compute attention weights ``[B, H, G, q, t]`` in new memory, at least float32."""
        queries = queries[self.sequences, self.heads, :, self.queries]
        keys = keys[self.sequences, self.heads, : self.end]
        b, h, g, q, d = queries.shape
        scaled = (queries * rule.scaling).reshape(b, h, g * q, d)
        logits = _products(scaled, keys.mT).view(b, h, g, q, self.end)
        if rule.softcap is not None:
            logits = logits.div_(rule.softcap).tanh_().mul_(rule.softcap)
        lowest = torch.finfo(logits.dtype).min
        future = torch.ones(q, q, dtype=torch.bool, device=keys.device).triu_(1)
        logits[..., -q:].masked_fill_(future, lowest)
        if valid is not None:
            hidden = ~valid[self.sequences, self.heads, None, None, : self.end]
            logits.masked_fill_(hidden, lowest)
        if rule.sinks is None:
            return logits.softmax(-1)
        sinks = wide(rule.sinks).view(-1, g, 1, 1)[self.heads].to(logits.dtype)
        logits = torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], dim=-1)
        return logits.softmax(-1)[..., :-1]


def _blocks(queries: Tensor, keys: Tensor, block: int | None) -> Iterator[_Block]:
    """Cut the weights into blocks that fit into memory: few, for few and large products.

    Only the rows that a block's last query can see are in it. Where not all heads fit, a block has
    fewer of them rather than fewer queries, so that keys are read once for many queries.
    """
    b, h, g, q, _ = queries.shape
    t = keys.shape[2]
    per_query = g * t * wide_dtype(keys).itemsize
    rows = block or _fitting(per_query, min(q, _ROWS))
    heads = _fitting(rows * per_query, b * h)
    sequences, heads = (b, h) if heads == b * h else (1, min(heads, h))
    for start in range(0, q, max(rows, 1)):
        stop = min(start + rows, q)
        for i in range(0, b, sequences):
            for j in range(0, h, heads):
                end = t - q + stop
                yield _Block(slice(i, i + sequences), slice(j, j + heads), slice(start, stop), end)


def _fitting(size: int, most: int) -> int:
    """Count how many pieces of ``size`` bytes are in memory at once, from 1 to ``most``."""
    return max(1, min(most, _BYTES // max(size, 1)))


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices, half types as such, into float32; float64 stays float64."""
    if a.is_cuda and a.dtype.itemsize == 2 and _HAS_WIDE_PRODUCTS:
        found = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return found.unflatten(0, a.shape[:2])
    return wide(a @ b)
