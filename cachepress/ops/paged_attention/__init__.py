"""Attention over several tensors of pairs, where each head has its own number of them.

Shape letters: B sequences, H KV heads, G query heads of each, n queries, X = B * H spans,
M = G * n queries of a span, P pages, C slots of a page, N columns of a part, D key head size,
E value head size.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from cachepress.ops.attention import AttentionRule
from cachepress.ops.paged_attention.batched import batched_attention
from cachepress.ops.paged_attention.layout import PAGE, Layout
from cachepress.ops.paged_attention.parts import DensePart, PagedPart, Part

_MOST_QUERIES = 64
_HAS_TRITON = find_spec("triton") is not None


def paged_attention(query: Tensor, parts: Sequence[Part], rule: AttentionRule) -> Tensor:
    """Compute attention of ``query [B, H, G, n, D]`` over all parts, ``[B, H, G, n, E]``.

    The result is float32, or float64 of float64. The Triton kernel takes few queries on a GPU
    that see every row of whole keys; batched products take all else, float64, and what gradients
    are recorded of.
    """
    b, _, g, n, _ = query.shape
    plain = all(part.bias is None and part.channels is None for part in parts)
    few = b * g * n <= _MOST_QUERIES and plain
    if query.is_cuda and few and _HAS_TRITON and query.dtype != torch.float64:
        # The kernel has no backward.
        if _records(query, parts, rule):
            return batched_attention(query, parts, rule)
        from cachepress.ops.paged_attention.triton import triton_attention

        return triton_attention(query, parts, rule)
    return batched_attention(query, parts, rule)


def _records(query: Tensor, parts: Sequence[Part], rule: AttentionRule) -> bool:
    """Tell whether gradients of the attention are recorded."""
    given = [query, *(x for part in parts for x in (part.keys, part.values))]
    given += [] if rule.sinks is None else [rule.sinks]
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)


__all__ = ["PAGE", "DensePart", "Layout", "PagedPart", "Part", "paged_attention"]
