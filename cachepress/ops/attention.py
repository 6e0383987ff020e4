"""Attention sums for scoring: grouped, so that keys are never repeated for their queries.

Shape letters are those of ``cachepress.view``. The rows of a table end with the rows of its
queries, so causality only ever touches the last Q columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.ops.precision import wide, wide_dtype


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


def attention_column_sums(
    queries: Tensor,
    keys: Tensor,
    valid: Tensor,
    counted: Tensor,
    rule: AttentionRule,
    block: int = 128,
) -> Tensor:
    """Sum the attention that each row receives over the queries, one block of queries at a time.

    Args:
        queries: ``[B, H, G, Q, D]`` of the last Q rows.
        keys: ``[B, H, T, D]``.
        valid: ``[B, H, T]`` bool, which rows can be attended to.
        counted: ``[B, Q]`` bool, which queries count.
        rule: the layer's rule.
        block: queries per block; the largest intermediate is ``[B, H, G, block, T]``.

    Returns:
        ``[B, H, G, T]`` in float32; in float64 of float64.
    """
    b, h, g, q, _ = queries.shape
    t = keys.shape[2]
    sums = torch.zeros(b, h, g, t, dtype=wide_dtype(keys), device=keys.device)
    for start in range(0, q, block):
        stop = min(start + block, q)
        end = t - q + stop
        part, votes = queries[..., start:stop, :], counted[:, None, None, start:stop, None]
        sums[..., :end] += _block_sums(part, keys[:, :, :end], valid[:, :, :end], votes, rule)
    return sums


def attention_weights(
    queries: Tensor, keys: Tensor, valid: Tensor, rule: AttentionRule, block: int = 128
) -> Iterator[tuple[slice, Tensor]]:
    """Iterate over attention weights, one block of queries at a time.

    Args:
        queries: ``[B, H, G, Q, D]`` of the last Q rows.
        keys: ``[B, H, T, D]``.
        valid: ``[B, H, T]`` bool, which rows can be attended to.
        rule: the layer's rule.
        block: queries per block.

    Yields:
        Which queries, and their weights ``[B, H, G, q, t]`` over the first ``t`` rows, those that
        the last of them can see; memory that may be written to.
    """
    q, t = queries.shape[3], keys.shape[2]
    for start in range(0, q, block):
        some = slice(start, min(start + block, q))
        end = t - q + some.stop
        shares, total = _shares(queries[..., some, :], keys[:, :, :end], valid[:, :, :end], rule)
        yield some, shares.div_(total)


def _block_sums(
    queries: Tensor, keys: Tensor, valid: Tensor, counted: Tensor, rule: AttentionRule
) -> Tensor:
    """Sum one block's attention over its queries, in as few passes over the logits as possible."""
    shares, total = _shares(queries, keys, valid, rule)
    return ((counted / total).mT @ shares).squeeze(-2)


def _shares(
    queries: Tensor, keys: Tensor, valid: Tensor, rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    """Compute the softmax's numerators ``[B, H, G, Q, T]`` and their sum ``[B, H, G, Q, 1]``."""
    logits = _logits(queries, keys, valid, rule)
    top = logits.amax(-1, keepdim=True)
    if rule.sinks is not None:
        top = torch.maximum(top, _sinks(rule.sinks, queries))
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    if rule.sinks is not None:
        total = total + (_sinks(rule.sinks, queries) - top).exp()
    return logits, total


def _logits(queries: Tensor, keys: Tensor, valid: Tensor, rule: AttentionRule) -> Tensor:
    """Compute masked logits ``[B, H, G, Q, T]`` in new memory, at least float32."""
    b, h, g, q, d = queries.shape
    scaled = (queries * rule.scaling).reshape(b, h, g * q, d)
    logits = wide(scaled @ keys.mT).view(b, h, g, q, -1)
    if rule.softcap is not None:
        logits = logits.div_(rule.softcap).tanh_().mul_(rule.softcap)
    lowest = torch.finfo(logits.dtype).min
    future = torch.ones(q, q, dtype=torch.bool, device=keys.device).triu_(1)
    logits[..., -q:].masked_fill_(future, lowest)
    if not bool(valid.all()):
        logits.masked_fill_(~valid[:, :, None, None], lowest)
    return logits


def _sinks(sinks: Tensor, queries: Tensor) -> Tensor:
    """Lay out the learned sink logits, ``[1, H, G, 1, 1]``."""
    return wide(sinks).view(1, *queries.shape[1:3], 1, 1)
