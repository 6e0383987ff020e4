"""Attention over several tensors of pairs, where each head has its own number of them.

Shape letters: B sequences, H KV heads, G query heads of each, n queries, X = B * H spans,
M = G * n queries of a span, P pages, C slots of a page, N columns of a part, D key head size,
E value head size.
"""

from collections.abc import Sequence

from torch import Tensor

from cachepress.ops.attention import AttentionRule
from cachepress.ops.paged_attention.batched import batched_attention
from cachepress.ops.paged_attention.layout import PAGE, Layout
from cachepress.ops.paged_attention.parts import DensePart, PagedPart, Part
from cachepress.ops.paged_attention.spans import Spans


def paged_attention(query: Tensor, parts: Sequence[Part], rule: AttentionRule) -> Tensor:
    """Compute attention of ``query [B, H, G, n, D]`` over all parts, ``[B, H, G, n, E]``.

    The result is float32, or float64 of float64.
    """
    return batched_attention(query, parts, rule)


__all__ = ["PAGE", "DensePart", "Layout", "PagedPart", "Part", "Spans", "paged_attention"]
