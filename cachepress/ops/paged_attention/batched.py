"""Attention by batched matrix products, with one softmax over the logits of all parts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cachepress.ops.attention import AttentionRule
from cachepress.ops.paged_attention.parts import Part
from cachepress.ops.precision import wide

LOGITS = 1 << 24
"""Most logits of one part that are held at once; more queries are taken in turns."""


def batched_attention(query: Tensor, parts: Sequence[Part], rule: AttentionRule) -> Tensor:
    """Compute attention of the queries over all parts.

    Args:
        query: ``[B, H, G, n, D]``.
        parts: the rows; of each span, at least one is visible to every query.
        rule: the layer's rule.

    Returns:
        ``[B, H, G, n, E]`` in float32; in float64 of float64.
    """
    b, h, g, n, d = query.shape
    step = max(1, LOGITS // (b * h * g * max(part.width for part in parts)))
    if n > step:
        return torch.cat(
            [
                batched_attention(
                    query[..., i : i + step, :],
                    [part.of_queries(slice(i, i + step)) for part in parts],
                    rule,
                )
                for i in range(0, n, step)
            ],
            dim=3,
        )
    # Half types are widened first: their products would be rounded.
    scaled = (wide(query) * rule.scaling).reshape(b * h, g * n, d)
    logits = [_logits(part, scaled, rule, (b, h, g, n)) for part in parts]
    widths = [x.shape[-1] for x in logits]
    if rule.sinks is not None:
        sinks = wide(rule.sinks).view(1, h, g, 1).expand(b, h, g, n)
        logits.append(sinks.reshape(b * h, g * n, 1))
    weights = torch.cat(logits, dim=-1).softmax(-1) if len(logits) > 1 else logits[0].softmax(-1)
    start, out = 0, None
    for part, width in zip(parts, widths, strict=True):
        share = part.weighted(weights[..., start : start + width])
        out = share if out is None else out + share
        start += width
    assert out is not None
    return out.view(b, h, g, n, -1)


def _logits(
    part: Part, query: Tensor, rule: AttentionRule, shape: tuple[int, int, int, int]
) -> Tensor:
    """Compute the logits ``[X, M, N]`` of one part in new memory."""
    logits = part.logits(query, rule.softcap)
    if part.bias is not None:
        logits.view(*shape, -1).add_(part.bias)
    return logits
