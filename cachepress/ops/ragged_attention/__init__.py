"""Attention over rows that lie in parts, with heads that hold different numbers of them.

Shape letters: B sequences, H KV heads, G query heads of each, n queries, X = B * H spans,
M = G * n queries of a span, P pages, C slots of a page, N columns of a part, D key head size,
E value head size.
"""

from cachepress.ops.ragged_attention.joint import ragged_attention
from cachepress.ops.ragged_attention.layout import PAGE, Layout
from cachepress.ops.ragged_attention.parts import DensePart, PagedPart, Part

__all__ = ["PAGE", "DensePart", "Layout", "PagedPart", "Part", "ragged_attention"]
