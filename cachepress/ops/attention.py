"""Attention weights for scoring: grouped, so that keys are never repeated for their queries.

Shape letters are those of ``cachepress.core``. The rows of a table end with the rows of its
queries, so causality only ever touches the last Q columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionRule:
    """How a layer turns query-key products into weights.

    Attributes:
        scaling: factor on the products.
        softcap: products are squashed to ``softcap * tanh(x / softcap)``; None for not at all.
        sinks: ``[H * G]`` a logit per query head that takes weight but belongs to no row.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


def attention_weights(queries: Tensor, keys: Tensor, valid: Tensor, rule: AttentionRule) -> Tensor:
    """Weights of the last Q queries over all rows.

    Args:
        queries: ``[B, H, G, Q, D]`` of the last Q rows.
        keys: ``[B, H, T, D]``.
        valid: ``[B, H, T]`` bool, rows that may be attended to.
        rule: the layer's rule.

    Returns:
        ``[B, H, G, Q, T]`` in float32. The line of a query that is padding is not meaningful.
    """
    b, h, g, q, d = queries.shape
    logits = (queries.reshape(b, h, g * q, d) @ keys.mT).float().mul_(rule.scaling)
    logits = logits.view(b, h, g, q, -1)  # [B, H, G, Q, T]
    if rule.softcap is not None:
        logits = logits.div_(rule.softcap).tanh_().mul_(rule.softcap)
    lowest = torch.finfo(torch.float32).min
    future = torch.ones(q, q, dtype=torch.bool, device=keys.device).triu_(1)
    logits[..., -q:].masked_fill_(future, lowest)
    if not bool(valid.all()):
        logits.masked_fill_(~valid[:, :, None, None], lowest)
    if rule.sinks is None:
        return logits.softmax(-1)
    sink = rule.sinks.float().view(1, h, g, 1, 1).expand(b, h, g, q, 1)
    return torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1]


def attention_column_sums(
    queries: Tensor, keys: Tensor, valid: Tensor, rule: AttentionRule, block: int = 128
) -> Tensor:
    """Attention that each row receives, summed over the queries, one block of queries at a time.

    Args:
        queries: ``[B, H, G, Q, D]`` of the last Q rows.
        keys: ``[B, H, T, D]``.
        valid: ``[B, H, T]`` bool; queries of rows that are not valid do not count.
        rule: the layer's rule.
        block: queries per block; the largest intermediate is ``[B, H, G, block, T]``.

    Returns:
        ``[B, H, G, T]`` in float32.
    """
    b, h, g, q, _ = queries.shape
    t = keys.shape[2]
    sums = torch.zeros(b, h, g, t, device=keys.device)
    for start in range(0, q, block):
        stop = min(start + block, q)
        end = t - q + stop
        seen = valid[:, :, :end]
        weights = attention_weights(queries[..., start:stop, :], keys[:, :, :end], seen, rule)
        counted = seen[:, :, None, end - (stop - start) :, None]
        sums[..., :end] += (weights * counted).sum(-2)
    return sums
