"""Parts of the rows that a layer attends to: how their logits and weighted sums are computed."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from cachepress.ops.ragged_attention.layout import PAGE, Layout

_LOWEST = torch.finfo(torch.float32).min


class Part(Protocol):
    """Rows of every span, as columns that a softmax can run over.

    ``bias`` is added to the logits, broadcast to ``[B, H, G, n, N]``; None if all are visible.
    """

    @property
    def bias(self) -> Tensor | None:
        """Added to the logits."""
        ...

    @property
    def width(self) -> int:
        """Columns."""
        ...

    def of_queries(self, some: slice) -> Self:
        """The part as some of the queries see it."""
        ...

    def logits(self, query: Tensor, softcap: float | None) -> Tensor:
        """Logits ``[X, M, N]`` of ``query [X, M, D]``, capped; lowest in empty columns."""
        ...

    def weighted(self, weights: Tensor) -> Tensor:
        """Sums ``[X, M, E]`` of the values by ``weights [X, M, N]``."""
        ...


@dataclass(frozen=True)
class DensePart:
    """Spans of the same length.

    Attributes:
        keys: ``[X, N, D]``, or ``[H, N, D]`` of one sequence that all share.
        values: ``[X, N, E]``, or ``[H, N, E]``.
        bias: added to the logits.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None

    @property
    def width(self) -> int:
        """Rows of each span."""
        return self.keys.shape[1]

    def of_queries(self, some: slice) -> "DensePart":
        """The part as some of the queries see it."""
        return self if self.bias is None else replace(self, bias=self.bias[..., some, :])

    def logits(self, query: Tensor, softcap: float | None) -> Tensor:
        """Logits ``[X, M, N]``; shared keys are read once for all sequences."""
        together = _together(query, self.keys.shape[0])
        products = together @ self.keys.to(query.dtype).mT
        return _apart(_capped(products, softcap), query.shape[0])

    def weighted(self, weights: Tensor) -> Tensor:
        """Sums ``[X, M, E]``."""
        together = _together(weights, self.values.shape[0])
        return _apart(together @ self.values.to(weights.dtype), weights.shape[0])


@dataclass(frozen=True)
class PagedPart:
    """Spans of any length, in pages: one product for all pages of all spans.

    Attributes:
        keys: ``[P, C, D]``.
        values: ``[P, C, E]``.
        layout: where the rows of each span are, ``X`` of them, or ``H`` that all sequences share.
        bias: added to the logits.
    """

    keys: Tensor
    values: Tensor
    layout: Layout
    bias: Tensor | None = None

    @property
    def width(self) -> int:
        """Slots of the longest span."""
        return self.layout.most_pages * PAGE

    def of_queries(self, some: slice) -> "PagedPart":
        """The part as some of the queries see it."""
        return self if self.bias is None else replace(self, bias=self.bias[..., some, :])

    def logits(self, query: Tensor, softcap: float | None) -> Tensor:
        """Logits ``[X, M, N]``, where N is the number of slots of the longest span."""
        layout, spans = self.layout, len(self.layout.lengths)
        together = _together(query, spans)
        products = _capped(together[layout.span] @ self.keys.to(query.dtype).mT, softcap)
        unused = layout.last_bias.expand(-1, products.shape[1], -1)
        products.index_add_(0, layout.last_page, unused)  # [P, M, C]
        columns = products.new_full((spans, products.shape[1], layout.most_pages, PAGE), _LOWEST)
        columns[layout.span, :, layout.page] = products
        return _apart(columns.flatten(2), query.shape[0])

    def weighted(self, weights: Tensor) -> Tensor:
        """Sums ``[X, M, E]``."""
        layout, spans = self.layout, len(self.layout.lengths)
        together = _together(weights, spans).unflatten(2, (-1, PAGE))
        sums = together[layout.span, :, layout.page] @ self.values.to(weights.dtype)  # [P, M, E]
        total = sums.new_zeros(spans, *sums.shape[1:]).index_add_(0, layout.span, sums)
        return _apart(total, weights.shape[0])


def _capped(products: Tensor, softcap: float | None) -> Tensor:
    return products if softcap is None else products.div_(softcap).tanh_().mul_(softcap)


def _together(x: Tensor, spans: int) -> Tensor:
    """Queries ``[X, M, ...]`` of all sequences as queries ``[H, B * M, ...]`` of one."""
    if x.shape[0] == spans:
        return x
    return x.unflatten(0, (-1, spans)).transpose(0, 1).flatten(1, 2)


def _apart(x: Tensor, spans: int) -> Tensor:
    """Back from ``[H, B * M, ...]`` to ``[X, M, ...]``."""
    if x.shape[0] == spans:
        return x
    b = spans // x.shape[0]
    return x.unflatten(1, (b, -1)).transpose(0, 1).flatten(0, 1)
