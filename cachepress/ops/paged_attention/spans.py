"""Where in memory the pairs of each sequence and KV head are, as kernels read them."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Coded(Protocol):
    """Quantized pages, ``[P, C, ...]`` each: see ``cachepress.cache.codec.Quantized``."""

    @property
    def codes(self) -> Tensor:
        """Numbers of a few bits, as many in a byte as it has room for."""
        ...

    @property
    def scale(self) -> Tensor:
        """What one step between codes is worth."""
        ...

    @property
    def zero(self) -> Tensor:
        """What code 0 stands for."""
        ...

    @property
    def bits(self) -> int:
        """Bits of a number."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers that were quantized."""
        ...

    @property
    def group(self) -> int | None:
        """Channels that share a scale; None for one that is broadcast."""
        ...


@dataclass(frozen=True)
class Spans:
    """Pairs that attention reads, in memory of rows; a span is a sequence and KV head.

    Attributes:
        keys: memory of rows of D numbers, or quantized pages.
        values: memory of rows of E numbers, or quantized pages.
        sequences: how many sequences have spans; sequence ``i`` of a batch reads those of
            ``i % sequences``.
        longest: rows of the longest span.
        starts: ``[spans]`` int32, the first row of each; None where they are ``stride`` apart.
        lengths: ``[spans]`` int32, the rows of each; None where all have ``longest``.
        stride: rows between the first rows of neighbouring spans.
        grows: whether these are the newest tokens, which a decoded token is appended to. Of several
            queries each sees those up to itself.
        positions: ``[rows]`` int32, the text column of each row; None where they count up from
            ``column``.
        column: text column of the first row of each span, without ``positions``.
        bias: ``[rows]`` float32, added to the logits of each row; None for nothing.
        pages: ``[batch * heads, n]`` int32, the pages of the spans that are read, in order, of
            which ``lengths [batch * heads]`` tells the rows; None for all.
        window: rows that an appended token sees of those that grow, its own included; 0 for all.
    """

    keys: Tensor | Coded
    values: Tensor | Coded
    sequences: int
    longest: int
    starts: Tensor | None = None
    lengths: Tensor | None = None
    stride: int = 0
    grows: bool = False
    positions: Tensor | None = None
    column: int = 0
    bias: Tensor | None = None
    pages: Tensor | None = None
    window: int = 0
