"""Page table: in which pages and slots the rows of each sequence and head are."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PAGE = 32
"""Slots of a page. A span ends with a page that is not full, so fewer than this are unused."""


_OF_KERNEL = ("starts", "counts")
_OF_PRODUCTS = ("span", "page", "last_page", "last_bias")


@dataclass(frozen=True)
class Layout:
    """Page table of spans of rows: a page belongs to one span, whose pages are in order.

    Attributes:
        lengths: rows of each span, on the CPU's side, so that asking costs no synchronisation.
        device: where the pages are.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, mask: Tensor, lengths: tuple[int, ...] | None = None) -> "Layout":
        """Make the page table of the rows of ``mask [B, H, T]``.

        ``lengths`` are those of each span where they are known: else they are the one thing that
        the device is asked for.
        """
        counts = mask.sum(-1).flatten()
        made = cls(tuple(counts.tolist()) if lengths is None else lengths, mask.device)
        if made.even is None and mask.device.type == "cuda":
            vars(made)["counts"] = counts.int()
        return made

    @cached_property
    def pages_of(self) -> tuple[int, ...]:
        """Number of pages of each span."""
        return tuple(-(-n // PAGE) for n in self.lengths)

    @cached_property
    def n_pages(self) -> int:
        """Number of all pages."""
        return sum(self.pages_of)

    @cached_property
    def even(self) -> int | None:
        """The number of rows that every span has, or None where they differ."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    @cached_property
    def span(self) -> Tensor:
        """The span of each page, ``[P]``."""
        spans = torch.arange(len(self.lengths))
        pages = torch.tensor(self.pages_of, dtype=torch.long)
        return spans.repeat_interleave(pages).to(self.device)

    @property
    def most_pages(self) -> int:
        """Pages of the longest span."""
        return max(self.pages_of, default=0)

    @cached_property
    def page(self) -> Tensor:
        """The rank of each page in its span, ``[P]``."""
        return torch.arange(self.n_pages, device=self.device) - self.first_page[self.span]

    @property
    def first_page(self) -> Tensor:
        """The first page of each span, ``[X]``."""
        if self.even is not None:
            return torch.arange(len(self.lengths), device=self.device) * self.pages_of[0]
        if self.device.type != "cuda":
            pages = torch.tensor(self.pages_of)
            return (pages.cumsum(0) - pages).to(self.device)
        pages = (self.counts.long() + PAGE - 1) // PAGE
        return pages.cumsum(0) - pages

    @cached_property
    def last_page(self) -> Tensor:
        """The last page of each span that has one, ``[spans that have rows]``."""
        ends = torch.tensor(self.pages_of).cumsum(0) - 1
        return ends[torch.tensor(self.lengths) > 0].to(self.device)

    @cached_property
    def last_bias(self) -> Tensor:
        """Bias of the logits of ``last_page``, ``[those, 1, C]``, which hides unused slots."""
        used = torch.tensor([(n - 1) % PAGE + 1 for n in self.lengths if n])
        unused = torch.arange(PAGE) >= used[:, None, None]
        bias = torch.zeros(unused.shape, dtype=torch.float32)
        return bias.masked_fill_(unused, torch.finfo(bias.dtype).min).to(self.device)

    def sources(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Find which of all entries of ``mask [B, H, T]`` each slot gets, and which slots get one.

        Nothing is asked of the device, as it would be for the entries that are True.
        """
        rows, n = mask.flatten(0, 1), self.n_pages * PAGE
        first = self.first_page[:, None] * PAGE
        slot = torch.where(rows, first + rows.cumsum(-1) - 1, n).flatten()  # The last is no slot.
        entry = torch.arange(rows.numel(), device=mask.device)
        source = torch.full((n + 1,), -1, device=mask.device).scatter_(0, slot, entry)[:-1]
        return source.clamp(min=0), source >= 0

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return the slot of each row, ``[X, longest]``, and which of these entries are rows."""
        lengths = torch.tensor(self.lengths, device=self.device)[:, None]
        column = torch.arange(max(self.lengths, default=0), device=self.device)
        real = column < lengths
        return torch.where(real, self.first_page[:, None] * PAGE + column, 0), real

    @cached_property
    def starts(self) -> Tensor:
        """The first row of each span among all slots, ``[X]`` int32."""
        return (self.first_page * PAGE).int()

    @cached_property
    def counts(self) -> Tensor:
        """The rows of each span, ``[X]`` int32, of spans of different lengths."""
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.device)

    def tensors(self) -> list[Tensor]:
        """List the index tensors that attention over spans of different lengths reads.

        Those that it reads on this device are made now, others where something asks for them.
        """
        if self.even is not None:
            return []
        for name in _OF_KERNEL if self.device.type == "cuda" else _OF_PRODUCTS:
            getattr(self, name)
        return [vars(self)[name] for name in (*_OF_KERNEL, *_OF_PRODUCTS) if name in vars(self)]
