"""Specification of attention, in plain loops: one query at a time, over the rows that it sees."""

import torch
from torch import Tensor

from cachepress.ops.attention import AttentionRule
from cachepress.ops.precision import wide, wide_dtype


def naive_attention(
    query: Tensor,
    rows: list[list[tuple[Tensor, Tensor]]],
    rule: AttentionRule,
    bias: list[list[Tensor]] | None = None,
) -> Tensor:
    """Compute attention where every sequence and KV head has its own number of rows.

    Args:
        query: ``[B, H, G, n, D]``.
        rows: for each sequence and KV head, keys ``[N, D]`` and values ``[N, E]``; all visible.
        rule: the layer's rule.
        bias: for each sequence and KV head, ``[N]`` added to the logits of each row; None for 0.

    Returns:
        ``[B, H, G, n, E]`` in float32; in float64 of float64.
    """
    b, h, g, n, _ = query.shape
    size = (b, h, g, n, rows[0][0][1].shape[-1])
    out = torch.zeros(size, dtype=wide_dtype(query))
    for i, j, k, q in torch.cartesian_prod(*(torch.arange(size) for size in (b, h, g, n))).tolist():
        keys, values = (wide(x) for x in rows[i][j])
        logits = keys @ wide(query[i, j, k, q]) * rule.scaling
        if rule.softcap is not None:
            logits = rule.softcap * torch.tanh(logits / rule.softcap)
        if bias is not None:
            logits = logits + bias[i][j]
        weights = logits.exp()
        total = weights.sum()
        if rule.sinks is not None:
            total = total + rule.sinks[j * g + k].exp()
        out[i, j, k, q] = weights @ values / total
    return out
