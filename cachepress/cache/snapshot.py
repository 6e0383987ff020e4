"""Snapshot of a compressed layer: what it holds at one moment, and attention over that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import ref

import torch
from torch import Tensor

from cachepress.cache import kernel
from cachepress.cache.codec import floats
from cachepress.cache.masks import TextMask
from cachepress.cache.pairs import Pairs
from cachepress.cache.segment import Segment
from cachepress.cache.tail import TailRows
from cachepress.ops import AttentionRule, following, wide, without_autocast
from cachepress.ops.paged_attention import Part, paged_attention
from cachepress.ops.paged_attention.parts import LOWEST


@dataclass(frozen=True)
class Snapshot:
    """Segments and tail of a layer as they were at one moment.

    Attributes:
        segments: compressed pairs, of all sequences, or of some that others share in turns: those
            of sequence ``i`` are in place ``i % F``.
        tail: pairs since.
        seen: text columns seen.
        batch: number of sequences.
        text_valid: ``[B, S]`` of the compressed text columns, those that are tokens; None if all.
        page_budget: pages of the segments that one query reads in each head; None for all.
        plans: what the kernel was told of the layer's storage.
    """

    segments: tuple[Segment, ...]
    tail: TailRows | None
    seen: int
    batch: int
    text_valid: Tensor | None
    page_budget: int | None = None
    plans: kernel.Plans = field(default_factory=kernel.Plans, compare=False)

    @property
    def start(self) -> int:
        """The text column of the tail's first pair."""
        return self.seen - (0 if self.tail is None else self.tail.keys.shape[2])

    @property
    def shared(self) -> bool:
        """Whether sequences share pairs."""
        return any(segment.shape[0] != self.batch for segment in self.segments)

    def lengths(self) -> Tensor:
        """Count the pairs of each head, ``[B, H]``."""
        own = self.seen - self.start
        total = torch.full((self.batch, self.heads), own)
        for segment in self.segments:
            own_rows = torch.tensor(segment.layout.lengths).view(segment.shape)
            total += own_rows.repeat(self.batch // segment.shape[0], 1)
        return total

    @property
    def heads(self) -> int:
        """KV heads."""
        if self.tail is not None:
            return self.tail.keys.shape[1]
        return self.segments[0].shape[1]

    @property
    def value_width(self) -> int:
        """Numbers of a value."""
        values = self.segments[0].values if self.tail is None else self.tail.values
        return values.shape[-1] if isinstance(values, Tensor) else values.width

    @property
    def storage(self) -> tuple[object, ...]:
        """What is another one as soon as pairs are stored elsewhere; it keeps nothing alive."""
        tail = () if self.tail is None else (self.tail.keys.data_ptr(), self.tail.keys.stride(1))
        return (*map(ref, self.segments), *tail)

    @property
    def device(self) -> torch.device:
        """Where the pairs are."""
        return self.segments[0].layout.device if self.tail is None else self.tail.keys.device

    def rows(self) -> Pairs:
        """Return all pairs as one table ``[B, H, T, ...]``, those of the tail last."""
        if not self.segments and self.tail is not None:
            return Pairs(self.tail.keys, self.tail.values)
        with following(*self._floats()):
            return self._table()

    def _floats(self) -> list[Tensor]:
        """List the numbers that may be a part of an autograd graph."""
        found = [] if self.tail is None else [self.tail.keys, self.tail.values]
        return found + [floats(x) for s in self.segments for x in (s.keys, s.values)]

    def _table(self) -> Pairs:
        parts = [segment.rows() for segment in self.segments]
        if self.tail is not None:
            parts.append(self.tail.rows(self.seen))
        parts = [self._expanded(part) for part in parts]
        if len(parts) == 1:
            return parts[0]
        return Pairs(
            keys=torch.cat([part.keys for part in parts], dim=2),
            values=torch.cat([part.values for part in parts], dim=2),
            positions=torch.cat([part.text_positions() for part in parts], dim=2),
            full=all(part.full for part in parts),
            rope=_column(parts, "rope", lambda x: torch.full_like(x.text_positions(), -1)),
            token_state=_column(parts, "token_state", partial(_numbers, number=float("nan"))),
            bias=_column(parts, "bias", partial(_numbers, number=0.0)),
        )

    def attend(self, query: Tensor, mask: TextMask, rule: AttentionRule) -> Tensor:
        """Compute attention of ``query [B, H * G, n, D]`` over all pairs, ``[B, n, H * G, E]``.

        The pairs of the tail end with those of the queries. Pairs that sequences share are read
        once for all of them. One query reads the pages that matter most to it, where a
        ``page_budget`` says so.
        """
        with without_autocast(query.device):
            return self._attend(query, mask, rule)

    def _attend(self, query: Tensor, mask: TextMask, rule: AttentionRule) -> Tensor:
        self.plans.group = query.shape[1] // self.heads
        if kernel.is_usable(query):
            out = kernel.attend(self, query, mask, rule)
            if out is not None:
                return out
        b, hq, n, d = query.shape
        bias = mask.of_rows(self.start, self.text_valid)
        if self.page_budget is None or n > 1:
            parts: list[Part] = [segment.part(bias, b) for segment in self.segments]
        else:
            spans = wide(query.detach()).reshape(b * self.heads, -1, d)
            parts = self._chosen_parts(spans, bias, self.page_budget, rule)
        if self.tail is not None:
            parts.append(self.tail.part(mask.of_columns(self.start, self.seen, query.device)))
        grouped = query.reshape(b, self.heads, hq // self.heads, n, d)
        out = paged_attention(grouped, parts, rule)
        return out.view(b, hq, n, -1).transpose(1, 2).to(query.dtype).contiguous()

    def records_gradients(self, query: Tensor, rule: AttentionRule) -> bool:
        """Tell whether gradients of attention are recorded."""
        given = [query, *self._floats()] + ([] if rule.sinks is None else [rule.sinks])
        return torch.is_grad_enabled() and any(x.requires_grad for x in given)

    def whole(self) -> "Snapshot":
        """Return the same snapshot without its page budget."""
        return replace(self, page_budget=None)

    def _chosen_parts(
        self, query: Tensor, mask: Tensor | None, page_budget: int, rule: AttentionRule
    ) -> list[Part]:
        """Choose the pages of each span with the highest bounds of logits for ``query [X, G, D]``.

        Every span reads its last page, and all of segments whose keys have no bounds.
        """
        segments = [
            segment for segment in self.segments if segment.bounded and segment.layout.n_pages
        ]
        if sum(segment.layout.most_pages for segment in segments) <= page_budget:
            return [segment.part(mask, self.batch) for segment in self.segments]
        others = [segment for segment in self.segments if not segment.bounded]
        parts = [segment.part(mask, self.batch) for segment in others]
        some = self.chosen_pages(segments, query, mask, page_budget, rule)
        return parts + [
            segment.part_of(pages, mask) for segment, pages in zip(segments, some, strict=True)
        ]

    def chosen_pages(
        self,
        segments: Sequence[Segment],
        query: Tensor,
        mask: Tensor | None,
        page_budget: int,
        rule: AttentionRule,
    ) -> list[Tensor]:
        """Tell for each segment ``[X, pages]`` which pages of a span one query reads."""
        biased = any(segment.bias is not None for segment in segments)
        bounds = [segment.worth(query, mask, rule if biased else None) for segment in segments]
        worth = torch.cat(bounds, dim=1)  # [X, pages]
        real = worth > LOWEST
        rank = torch.arange(worth.shape[1], device=worth.device).expand_as(worth)
        last = rank.masked_fill(~real, -1).amax(-1, keepdim=True)
        worth = worth.masked_fill(rank == last, float("inf"))
        best = worth.topk(min(page_budget, worth.shape[1]), dim=-1).indices
        chosen = torch.zeros_like(real).scatter_(-1, best, True) & real
        return list(chosen.split([segment.layout.most_pages for segment in segments], dim=1))

    def _expanded(self, rows: Pairs) -> Pairs:
        """Repeat a table that sequences share for every sequence."""
        if rows.keys.shape[0] == self.batch:
            return rows
        columns = {name: x for name, x in vars(rows).items() if isinstance(x, Tensor)}
        return replace(rows, **{name: self._repeated(x) for name, x in columns.items()})

    def _repeated(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return x.expand(self.batch, *x.shape[1:])
        return x.repeat(self.batch // x.shape[0], *[1] * (x.ndim - 1))


def _column(parts: list[Pairs], name: str, nothing: Callable[[Pairs], Tensor]) -> Tensor | None:
    """Join a column that some parts have, with what stands for it in the others."""
    found = [getattr(part, name) for part in parts]
    if all(x is None for x in found):
        return None
    each = zip(parts, found, strict=True)
    return torch.cat([nothing(part) if x is None else x for part, x in each], dim=2)


def _numbers(part: Pairs, number: float) -> Tensor:
    """Make the same number for each pair, ``[B, H, T]``."""
    return wide(part.keys.new_full(part.keys.shape[:3], number))
