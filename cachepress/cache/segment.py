"""Immutable storage of compressed pairs in pages, each head with its own number of pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.cache.codec import (
    Codec,
    Quantized,
    Stored,
    bounds_of,
    changed,
    decoded,
    floats,
    joined_pages,
    stacked_pages,
)
from cachepress.cache.masks import bias_of_pairs
from cachepress.cache.pairs import Pairs
from cachepress.ops import AttentionRule, entries_of, following, wide_dtype
from cachepress.ops.paged_attention import PAGE, DensePart, Layout, PagedPart, Part
from cachepress.ops.paged_attention.parts import LOWEST, apart, of_channels, together


@dataclass(frozen=True, eq=False)
class Segment:
    """Key-value pairs of each sequence and KV head, every head with its own number, in pages.

    A head costs its own pairs and what is left of its last page. A segment is never written to, so
    any number of caches can hold it.

    Attributes:
        shape: ``(B, H)``.
        layout: where each head's pairs are.
        keys: ``[P, C, D]``, as they are or quantized; of some channels only, where there are
            ``key_channels``.
        values: ``[P, C, E]``, as they are or quantized.
        positions: ``[P, C]`` text column of each pair, -1 in an unused slot.
        rope: ``[P, C]`` position that each key is rotated to; None where it is the position.
        token_state: ``[P, C]`` a number that a press keeps with each token; None for none.
        bias: ``[P, C]`` added to the logits of each pair, lowest in an unused slot; None for 0.
        key_channels: ``[B * H, D']`` the channels of the keys that are stored, ascending; None for
            all.
        bounds: ``[P, 2, D']`` the lowest and the highest number of each channel of a page's keys;
            None where nobody asks. Quantized keys know their own.
        width: channels of a key, stored or not.
    """

    shape: tuple[int, int]
    layout: Layout
    keys: Stored
    values: Stored
    positions: Tensor
    rope: Tensor | None = None
    token_state: Tensor | None = None
    bias: Tensor | None = None
    key_channels: Tensor | None = None
    width: int = 0
    bounds: Tensor | None = None

    def __post_init__(self) -> None:
        # The index is made with the segment, so that the bytes are there from the start.
        self.layout.tensors()

    @classmethod
    def of(
        cls,
        rows: Pairs,
        mask: Tensor,
        codec: Codec | None = None,
        key_channels: Tensor | None = None,
        bounded: bool = False,
        lengths: tuple[int, ...] | None = None,
        peaks: Sequence[float | None] = (None, None),
    ) -> "Segment":
        """Store the pairs of ``mask [B, H, T]`` in order, with some ``key_channels [B, H, D]``.

        ``bounded`` says that the keys of each page get bounds. The device is asked how many pairs
        each head has and, of a codec, for the ``peak_of`` keys and values: unless these are known.
        """
        b, h, _ = mask.shape
        layout = Layout.of(mask, lengths)
        source, used = layout.sources(mask)
        numbers = wide_dtype(rows.keys)

        def paged(x: Tensor, empty: float = 0) -> Tensor:
            rows = entries_of(x, source)
            unused = ~used.view(-1, *[1] * (rows.ndim - 1))
            return rows.masked_fill(unused, empty).unflatten(0, (layout.n_pages, PAGE))

        chosen = None if key_channels is None else _indices(key_channels)
        with following(rows.keys, rows.values):
            keys, values = paged(_picked(rows.keys, chosen)), paged(rows.values)
        positions = paged(rows.text_positions().int(), -1)
        return cls(
            shape=(b, h),
            layout=layout,
            keys=keys if codec is None else codec.encode_keys(keys, positions >= 0, peaks[0]),
            values=values if codec is None else codec.encode_values(values, peaks[1]),
            positions=positions,
            rope=None if rows.rope is None else paged(rows.rope.int(), -1),
            token_state=None if rows.token_state is None else paged(rows.token_state.to(numbers)),
            bias=None if rows.bias is None else paged(rows.bias.to(numbers), LOWEST),
            key_channels=None if chosen is None else chosen.flatten(0, 1),
            width=rows.keys.shape[-1],
            bounds=bounds_of(keys, positions >= 0) if bounded and codec is None else None,
        )

    def rows(self) -> Pairs:
        """Return all pairs as a table ``[B, H, longest, ...]``; a view if heads have one length."""
        if (n := self.layout.even) is not None:
            return self._table(lambda x: self._spans(x)[:, :, :n])
        table, real = self.layout.padded()
        rows = self._table(lambda x: x.flatten(0, 1)[table].unflatten(0, self.shape))
        hidden = ~real.unflatten(0, self.shape)
        return replace(rows, positions=rows.text_positions().masked_fill(hidden, -1), full=False)

    def _table(self, laid: Callable[[Tensor], Tensor]) -> Pairs:
        """Lay out every column as a table."""
        keys, values = self._whole(laid(decoded(self.keys))), laid(decoded(self.values))
        numbers = {name: laid(x) for name, x in self._numbers().items()}
        return replace(Pairs(keys, values, laid(self.positions)), **numbers)

    def _numbers(self) -> dict[str, Tensor]:
        """Return what else there is with a number for each slot, by name."""
        found = {"rope": self.rope, "token_state": self.token_state, "bias": self.bias}
        return {name: x for name, x in found.items() if x is not None}

    def part(self, mask: Tensor | None, batch: int | None = None) -> Part:
        """Lay out the pairs for the attention function.

        Args:
            mask: added to the logits, ``[B', n, S]`` over text columns; None if all are visible.
            batch: sequences that read the pairs; None for as many as there are.
        """
        n = self.layout.even
        keys, values = decoded(self.keys), decoded(self.values)
        bias = self._bias(mask, batch or self.shape[0], n)
        if n is None:
            return PagedPart(keys, values, self.layout, bias, self.key_channels)
        keys, values = (self._spans(x)[:, :, :n].flatten(0, 1) for x in (keys, values))
        return DensePart(keys, values, bias, self.key_channels)

    @property
    def whole_row(self) -> int:
        """Bytes of a pair of a head before compression: all channels, not quantized."""
        value = self.values
        width = value.width if isinstance(value, Quantized) else value.shape[-1]
        return self.width * self.keys.dtype.itemsize + width * value.dtype.itemsize

    @property
    def bounded(self) -> bool:
        """Whether the keys of each page have bounds, which a page budget needs."""
        return self.bounds is not None or isinstance(self.keys, Quantized)

    def worth(
        self, query: Tensor, mask: Tensor | None, rule: AttentionRule | None = None
    ) -> Tensor:
        """Compute an upper bound of each page's logits, over all queries of a span, ``[X, pages]``.

        The highest product of a query with keys within the page's bounds, over all queries of the
        span; lowest where a span has no page, or ``mask`` hides all of it.

        Args:
            query: ``[X, M, D]``.
            mask: added to the logits, ``[B', 1, S]`` over text columns; None if all are visible.
            rule: makes logits of the products, to which the page's highest bias is added; None for
                products, which have the order of logits where no pair has a bias.
        """
        layout, spans = self.layout, len(self.layout.lengths)
        bounds = self.keys.bounds() if isinstance(self.keys, Quantized) else self.bounds
        assert bounds is not None
        bounds = bounds.flatten(1).to(query.dtype)  # [P, 2 * D']
        queries = of_channels(together(query, spans), self.key_channels)
        signed = torch.cat([queries.clamp(max=0), queries.clamp(min=0)], dim=-1)
        if layout.even is not None:
            products = torch.bmm(signed, bounds.view(spans, -1, bounds.shape[-1]).mT)
        else:
            each = torch.bmm(signed.index_select(0, layout.span), bounds.unsqueeze(-1))
            products = each.new_full((spans, signed.shape[1], layout.most_pages), LOWEST)
            products[layout.span, :, layout.page] = each.squeeze(-1)
        worth = apart(products, query.shape[0]).amax(1)
        if rule is not None:
            worth = torch.where(worth > LOWEST, rule.logits(worth), worth)
        bias = self._bias(mask, len(worth) // self.shape[1])
        if bias is None:
            return worth
        highest = bias.reshape(*worth.shape, PAGE).amax(-1)
        raised = worth if rule is None else worth + highest
        return raised.masked_fill(highest <= LOWEST, LOWEST)

    def part_of(self, chosen: Tensor, mask: Tensor | None) -> DensePart:
        """Lay out the ``chosen`` pages ``[X, pages]`` of each span for the attention function.

        ``mask`` is that of ``worth``.
        """
        spans, width = len(chosen), int(chosen.sum(-1).max())
        b, h = spans // self.shape[1], self.shape[1]
        real, rank = chosen.int().topk(width, dim=-1)
        first = self.layout.first_page.repeat(spans // len(self.layout.lengths))  # [X]
        pages = torch.where(real > 0, first[:, None] + rank, 0).flatten()

        def picked(x: Tensor) -> Tensor:
            return x.index_select(0, pages)  # Several times as fast as indexing.

        keys, values = (decoded(changed(x, picked)) for x in (self.keys, self.values))
        positions = picked(self.positions).masked_fill(real.view(-1, 1) == 0, -1)
        positions = positions.view(b, h, width * PAGE)
        bias = torch.zeros(positions.shape, dtype=torch.float32, device=positions.device)
        own = None if self.bias is None else picked(self.bias).view(positions.shape)
        if mask is None:
            bias = (bias if own is None else own)[:, :, None, None]
        else:
            bias = bias_of_pairs(mask, positions, own)
        bias = bias.masked_fill(positions[:, :, None, None] < 0, LOWEST)
        key_channels = self.key_channels
        if key_channels is not None:
            key_channels = key_channels.repeat(spans // len(key_channels), 1)
        keys, values = (x.view(spans, width * PAGE, x.shape[-1]) for x in (keys, values))
        return DensePart(keys, values, bias, key_channels)

    def select(self, sequences: Tensor) -> "Segment":
        """Return a segment of some of the sequences ``[B']``, which may repeat."""
        b, h = self.shape
        wanted = sequences.tolist()
        lengths = [self.layout.lengths[i * h : (i + 1) * h] for i in wanted]
        starts = self.layout.first_page.view(b, h).tolist()
        counts = [self.layout.pages_of[i * h : (i + 1) * h] for i in range(b)]
        pages = torch.tensor(
            [starts[i][0] + p for i in wanted for p in range(sum(counts[i]))],
            dtype=torch.long,
            device=self.layout.device,
        )
        return replace(
            self,
            shape=(len(wanted), h),
            layout=Layout(tuple(n for row in lengths for n in row), self.layout.device),
            keys=changed(self.keys, lambda x: x[pages]),
            values=changed(self.values, lambda x: x[pages]),
            positions=self.positions[pages],
            bounds=None if self.bounds is None else self.bounds[pages],
            key_channels=None
            if self.key_channels is None
            else self.key_channels.unflatten(0, self.shape)[wanted].flatten(0, 1),
            **{name: x[pages] for name, x in self._numbers().items()},
        )

    @property
    def form(self) -> tuple[object, ...]:
        """What must be equal for segments to be stacked or joined."""
        stored = [
            (x.form if isinstance(x, Quantized) else x.dtype) for x in (self.keys, self.values)
        ]
        key_channels = None if self.key_channels is None else self.key_channels.shape[-1]
        has = (self.bias is not None, self.bounds is not None)
        return (self.shape[1], *stored, self.width, key_channels, *has)

    @classmethod
    def stack(cls, segments: Sequence["Segment"]) -> "Segment":
        """Stack the sequences of several segments of the same form into one segment, for decoding.

        What only presses read is left out: positions that keys are rotated to, and token states.
        """
        first = segments[0]

        def stacked(columns: Sequence[Tensor | None]) -> Tensor | None:
            found = [x for x in columns if x is not None]
            return torch.cat(found) if found else None

        return replace(
            first,
            shape=(sum(segment.shape[0] for segment in segments), first.shape[1]),
            layout=Layout(
                tuple(n for segment in segments for n in segment.layout.lengths),
                first.layout.device,
            ),
            keys=stacked_pages([segment.keys for segment in segments]),
            values=stacked_pages([segment.values for segment in segments]),
            positions=torch.cat([segment.positions for segment in segments]),
            rope=None,
            token_state=None,
            bias=stacked([segment.bias for segment in segments]),
            key_channels=stacked([segment.key_channels for segment in segments]),
            bounds=stacked([segment.bounds for segment in segments]),
        )

    def detach(self) -> "Segment":
        """Return the same segment as a part of no autograd graph."""
        keys, values = (floats(x).requires_grad for x in (self.keys, self.values))
        if not keys and not values:
            return self
        return replace(
            self,
            keys=changed(self.keys, Tensor.detach),
            values=changed(self.values, Tensor.detach),
        )

    def join(self, other: "Segment") -> "Segment":
        """Append the pairs of another segment to those of this one; both have full pages only."""
        spans = len(self.layout.lengths)

        def joined(x: Tensor, y: Tensor) -> Tensor:
            pages = (z.view(spans, -1, *z.shape[1:]) for z in (x, y))
            return torch.cat(list(pages), dim=1).flatten(0, 1)

        lengths = zip(self.layout.lengths, other.layout.lengths, strict=True)
        return replace(
            self,
            layout=Layout(tuple(a + b for a, b in lengths), self.layout.device),
            keys=joined_pages(self.keys, other.keys, joined),
            values=joined_pages(self.values, other.values, joined),
            positions=joined(self.positions, other.positions),
            bounds=None
            if self.bounds is None or other.bounds is None
            else joined(self.bounds, other.bounds),
        )

    def tensors(self) -> Sequence[Tensor]:
        """List all tensors that are allocated."""
        columns = [self.positions, *self._numbers().values(), *self.layout.tensors()]
        columns += [x for x in (self.key_channels, self.bounds) if x is not None]
        for x in (self.keys, self.values):
            columns += x.tensors() if isinstance(x, Quantized) else [x]
        return columns

    def _whole(self, keys: Tensor) -> Tensor:
        """Fill keys ``[B, H, n, D]`` with zeros in the channels that are not stored."""
        if self.key_channels is None:
            return keys
        b, h, n, _ = keys.shape
        index = self.key_channels.view(b, h, 1, -1).expand(-1, -1, n, -1)
        return keys.new_zeros(b, h, n, self.width).scatter(-1, index, keys)

    def _spans(self, x: Tensor) -> Tensor:
        """View the pages of spans of one length as a table ``[B, H, slots, ...]``."""
        b, h = self.shape
        return x.reshape(b, h, -1, *x.shape[2:])

    def _bias(self, mask: Tensor | None, batch: int, n: int | None = None) -> Tensor | None:
        """Compute what is added to the logits of the longest span's slots, ``[B, H, 1, q, slots]``.

        That is what a mask over text columns has for each pair, and the pair's own bias; None for
        nothing. ``n`` is the number of slots, None for all.
        """
        own = None if self.bias is None else self._slots(self.bias, LOWEST)[:, :, :n]
        own = None if own is None else own.repeat(batch // len(own), 1, 1)
        if mask is None:
            return None if own is None else own[:, :, None, None]
        return bias_of_pairs(mask, self._slots(self.positions, -1)[:, :, :n], own)

    def _slots(self, x: Tensor, empty: float) -> Tensor:
        """Lay out pages ``[P, C]`` as a table ``[F, H, slots of the longest span]``."""
        layout = self.layout
        if layout.even is not None:
            return self._spans(x)
        table = x.new_full((len(layout.lengths), layout.most_pages, PAGE), empty)
        table[layout.span, layout.page] = x
        return table.view(*self.shape, -1)


def _indices(key_channels: Tensor) -> Tensor:
    """Turn the mask ``key_channels [B, H, D]``, as many in every head, into ``[B, H, D']``."""
    # A copy, because a view would hold the indices of the heads as well.
    chosen = key_channels.nonzero()[:, -1].clone()
    return chosen.view(*key_channels.shape[:2], -1)


def _picked(keys: Tensor, chosen: Tensor | None) -> Tensor:
    """Gather the chosen channels ``[B, H, D']`` of keys ``[B, H, T, D]``."""
    if chosen is None:
        return keys
    return keys.gather(-1, chosen.unsqueeze(2).expand(-1, -1, keys.shape[2], -1))


def segments_of(
    rows: Pairs,
    mask: Tensor,
    codec: Codec | None,
    key_channels: Tensor | None = None,
    bounded: bool = False,
    lengths: tuple[int, ...] | None = None,
) -> tuple[Segment, ...]:
    """Store the pairs of ``mask [B, H, T]`` in segments, the newest of a codec's as they are."""
    if codec is None:
        return (Segment.of(rows, mask, None, key_channels, bounded, lengths),)
    rank = mask.flip(-1).cumsum(-1).flip(-1)  # 1 for the last pair that stays
    newest = mask & (rank <= codec.residual)
    old = mask & ~newest
    counts = tuple(mask.sum(-1).flatten().tolist()) if lengths is None else lengths
    of_newest = tuple(min(n, codec.residual) for n in counts)
    of_old = tuple(n - m for n, m in zip(counts, of_newest, strict=True))
    last = Segment.of(rows, newest, None, key_channels, bounded, of_newest)
    if not any(of_old):
        return (last,)
    return Segment.of(rows, old, codec, key_channels, bounded, of_old), last
