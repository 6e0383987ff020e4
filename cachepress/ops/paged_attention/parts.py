"""Parts of a layer's pairs, dense or paged: their logits and weighted sums of values."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from cachepress.ops.paged_attention.layout import PAGE, Layout

LOWEST = torch.finfo(torch.float32).min


class Part(Protocol):
    """Rows of every span that attention reads together; columns of its logits.

    ``bias`` is added to the logits, broadcast to ``[B, H, G, n, N]``; None for nothing.
    """

    @property
    def keys(self) -> Tensor:
        """Keys of the rows, in whatever order."""
        ...

    @property
    def values(self) -> Tensor:
        """Values of the rows, in the order of the keys."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """Bias to add to the logits; None if all rows are visible."""
        ...

    @property
    def channels(self) -> Tensor | None:
        """The channels of the queries that the keys have; None for all."""
        ...

    @property
    def width(self) -> int:
        """Columns of the logits: rows of the longest span, or its slots."""
        ...

    def of_queries(self, some: slice) -> Self:
        """Restrict the bias to some of the queries."""
        ...

    def logits(self, query: Tensor, softcap: float | None) -> Tensor:
        """Compute the logits ``[X, M, N]`` of ``query [X, M, D]``; lowest in empty columns."""
        ...

    def weighted(self, weights: Tensor) -> Tensor:
        """Sum the values by ``weights [X, M, N]``, ``[X, M, E]``."""
        ...


@dataclass(frozen=True)
class DensePart:
    """Spans of the same length.

    Attributes:
        keys: ``[X, N, D]``, or ``[H, N, D]`` of one sequence that all share.
        values: ``[X, N, E]``, or ``[H, N, E]``.
        bias: added to the logits.
        channels: ``[X or H, D]`` the channels of the queries that the keys have; None for all.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None
    channels: Tensor | None = None

    @property
    def width(self) -> int:
        """Rows of each span."""
        return self.keys.shape[1]

    def of_queries(self, some: slice) -> "DensePart":
        """Restrict the bias to some of the queries."""
        return replace(self, bias=_of_queries(self.bias, some))

    def logits(self, query: Tensor, softcap: float | None) -> Tensor:
        """Compute the logits ``[X, M, N]``; shared keys are read once for all sequences."""
        queries = of_channels(together(query, self.keys.shape[0]), self.channels)
        products = torch.bmm(queries, self.keys.to(query.dtype).mT)
        return apart(_capped(products, softcap), query.shape[0])

    def weighted(self, weights: Tensor) -> Tensor:
        """Sum the values by weights, ``[X, M, E]``."""
        queries = together(weights, self.values.shape[0])
        return apart(torch.bmm(queries, self.values.to(weights.dtype)), weights.shape[0])


@dataclass(frozen=True)
class PagedPart:
    """Spans of any length, in pages: one product for all pages of all spans.

    Attributes:
        keys: ``[P, C, D]``.
        values: ``[P, C, E]``.
        layout: where the rows of each span are, ``X`` of them, or ``H`` that all sequences share.
        bias: added to the logits.
        channels: ``[X or H, D]`` the channels of the queries that the keys have; None for all.
    """

    keys: Tensor
    values: Tensor
    layout: Layout
    bias: Tensor | None = None
    channels: Tensor | None = None

    @property
    def width(self) -> int:
        """Slots of the longest span."""
        return self.layout.most_pages * PAGE

    def of_queries(self, some: slice) -> "PagedPart":
        """Restrict the bias to some of the queries."""
        return replace(self, bias=_of_queries(self.bias, some))

    def logits(self, query: Tensor, softcap: float | None) -> Tensor:
        """Compute the logits ``[X, M, N]``, where N is the number of slots of the longest span."""
        layout, spans = self.layout, len(self.layout.lengths)
        queries = of_channels(together(query, spans), self.channels)
        pages = queries.index_select(0, layout.span)
        products = torch.bmm(pages, self.keys.to(query.dtype).mT)
        products = _capped(products, softcap)
        unused = layout.last_bias.to(products.dtype).expand(-1, products.shape[1], -1)
        products.index_add_(0, layout.last_page, unused)  # [P, M, C]
        columns = products.new_full((spans, products.shape[1], layout.most_pages, PAGE), LOWEST)
        columns[layout.span, :, layout.page] = products
        return apart(columns.flatten(2), query.shape[0])

    def weighted(self, weights: Tensor) -> Tensor:
        """Sum the values by weights, ``[X, M, E]``."""
        layout, spans = self.layout, len(self.layout.lengths)
        pages = together(weights, spans).unflatten(2, (-1, PAGE))
        shares = pages[layout.span, :, layout.page]  # [P, M, C]
        sums = torch.bmm(shares, self.values.to(weights.dtype))  # [P, M, E]
        total = sums.new_zeros(spans, *sums.shape[1:]).index_add_(0, layout.span, sums)
        return apart(total, weights.shape[0])


def of_channels(queries: Tensor, channels: Tensor | None) -> Tensor:
    """Restrict queries ``[X, M, D]`` to the channels ``[X, D']``."""
    if channels is None:
        return queries
    return queries.gather(-1, channels.unsqueeze(1).expand(-1, queries.shape[1], -1))


def _of_queries(bias: Tensor | None, some: slice) -> Tensor | None:
    """Restrict a bias ``[..., n, N]`` to some of the queries; one of all of them stays."""
    return bias if bias is None or bias.shape[-2] == 1 else bias[..., some, :]


def _capped(products: Tensor, softcap: float | None) -> Tensor:
    if softcap is None:
        return products
    if products.requires_grad:
        return (products / softcap).tanh() * softcap  # Autograd keeps what tanh returned.
    return products.div_(softcap).tanh_().mul_(softcap)


def together(x: Tensor, spans: int) -> Tensor:
    """Lay out queries ``[X, M, ...]`` of all sequences as queries ``[H, B * M, ...]`` of one."""
    if x.shape[0] == spans:
        return x
    return x.unflatten(0, (-1, spans)).transpose(0, 1).flatten(1, 2)


def apart(x: Tensor, spans: int) -> Tensor:
    """Undo ``together``: from ``[H, B * M, ...]`` to ``[X, M, ...]``."""
    if x.shape[0] == spans:
        return x
    b = spans // x.shape[0]
    return x.unflatten(1, (b, -1)).transpose(0, 1).flatten(0, 1)
