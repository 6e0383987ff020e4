"""Growing buffer of the pairs that were appended since a layer was last compressed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.cache.codec import peak_of
from cachepress.cache.pairs import Pairs
from cachepress.ops import Ahead, following
from cachepress.ops.paged_attention import PAGE, DensePart, Spans

SLACK = 64
"""Slots that a buffer has more than a decoded token needs, so that the next ones do not copy it."""


@dataclass
class Tail:
    """The newest tokens, the same in every head: text columns without a gap, in a growing buffer.

    Attributes:
        keys: ``[B, H, slots, D]``, of which the first ``n`` are in use.
        values: ``[B, H, slots, E]``.
        n: slots in use.
        fixed: whether nothing may be written to the buffer, which autograd may have saved.
        asked: how many of the oldest pairs the device was asked for the ``peak_of``, and what it
            said of keys and values; None before that.
    """

    keys: Tensor
    values: Tensor
    n: int
    fixed: bool = False
    asked: tuple[int, Ahead] | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, room: int = SLACK) -> "Tail":
        """Make a tail that holds a copy of these pairs, with ``room`` for more.

        Pairs that autograd may follow are copied in its graph, and without room.
        """
        with following(keys, values):
            if torch.is_grad_enabled():
                keys, values = (
                    x.clone(memory_format=torch.contiguous_format) for x in (keys, values)
                )
                return cls(keys, values, keys.shape[2], fixed=True)
        return cls(_with_room(keys, room), _with_room(values, room), keys.shape[2])

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append pairs; decoding copies the buffer once in ``SLACK`` tokens.

        Where gradients are recorded every step copies it, as transformers' own caches do. Where
        they are not, what was held is no part of a graph any more, as in these either.
        """
        n = self.n + keys.shape[2]
        if torch.is_grad_enabled():
            held = self.read()
            self.keys = torch.cat([held.keys, keys], dim=2)
            self.values = torch.cat([held.values, values], dim=2)
            self.n, self.fixed = n, True
            return
        fits = _holds(self.keys, keys.dtype) and _holds(self.values, values.dtype)
        if n > self.keys.shape[2] or not fits or self.fixed:
            room = n - self.n + slack_after(keys)
            self.keys = _with_room(self.keys[:, :, : self.n], room, keys.dtype)
            self.values = _with_room(self.values[:, :, : self.n], room, values.dtype)
            self.fixed = False
        self.keys[:, :, self.n : n] = keys
        self.values[:, :, self.n : n] = values
        self.n = n

    def paged(self, residual: int) -> int:
        """Count the oldest pairs that are put into full pages, but for the ``residual`` newest."""
        return max(0, self.n - residual) // PAGE * PAGE

    def ask(self, residual: int) -> None:
        """Ask the device for the peaks of those that will be put into pages next."""
        n = max(PAGE, self.paged(residual))
        if self.n >= n and (self.asked is None or self.asked[0] != n):
            peaks = [peak_of(x[:, :, :n]) for x in (self.keys, self.values)]
            self.asked = n, Ahead(torch.cat(peaks))

    def peaks(self, n: int) -> Sequence[float | None]:
        """Return the peaks of keys and values of the oldest ``n`` pairs; None if not asked for."""
        return (None, None) if self.asked is None or self.asked[0] != n else self.asked[1].read()

    def crop(self, n: int) -> None:
        """Forget the newest ``n`` pairs."""
        self.n, self.asked = self.n - n, None

    def make_room(self) -> None:
        """Make room for one more token, without gradients."""
        if self.n == self.keys.shape[2]:
            self.keys, self.values = (_with_room(x, SLACK) for x in (self.keys, self.values))

    def read(self) -> "TailRows":
        """Return the pairs of now; pairs that are appended later do not show."""
        if self.fixed:
            with following(self.keys, self.values):
                return TailRows(self.keys[:, :, : self.n], self.values[:, :, : self.n])
        return TailRows(self.keys[:, :, : self.n], self.values[:, :, : self.n])

    def copy(self) -> "Tail":
        """Copy the tail with its pairs."""
        rows = self.read()
        return Tail.of(rows.keys, rows.values)

    def select(self, sequences: Tensor) -> "Tail":
        """Return a tail of some of the sequences ``[B']``, which may repeat."""
        rows = self.read()
        with following(rows.keys, rows.values):
            keys, values = (x.index_select(0, sequences) for x in (rows.keys, rows.values))
        return Tail.of(keys, values)

    def exact(self) -> "Tail":
        """Return the tail in a buffer of exactly its length."""
        if self.keys.shape[2] == self.n:
            return self
        rows = self.read()
        return Tail.of(rows.keys, rows.values, room=0)

    def tensors(self) -> list[Tensor]:
        """List all tensors that are allocated."""
        return [self.keys, self.values]


def slack_after(keys: Tensor) -> int:
    """Choose how many free slots follow new ``keys``: none after a prompt, some in decoding."""
    return SLACK if keys.shape[2] == 1 else 0


@dataclass(frozen=True)
class TailRows:
    """Pairs of a tail at one moment, ``[B, H, n, ...]`` each."""

    keys: Tensor
    values: Tensor

    def rows(self, seen: int) -> Pairs:
        """Return the pairs as a table, when ``seen`` text columns were seen."""
        b, h, n = self.keys.shape[:3]
        positions = torch.arange(seen - n, seen, dtype=torch.int32, device=self.keys.device)
        return Pairs(self.keys, self.values, positions.expand(b, h, n))

    def spans(self, seen: int) -> Spans:
        """Tell a kernel where the pairs are, when ``seen`` text columns were seen."""
        b, _, n = self.keys.shape[:3]
        room = self.keys.stride(1) // self.keys.shape[3]
        return Spans(self.keys, self.values, b, n, stride=room, grows=True, column=seen - n)

    def newest(self, n: int) -> "TailRows":
        """Return the last ``n`` pairs, or all if there are not as many."""
        return TailRows(self.keys[:, :, -n:], self.values[:, :, -n:])

    def part(self, mask: Tensor | None) -> DensePart:
        """Lay out the pairs for the attention function, with a mask ``[B or 1, n, pairs]``."""
        bias = None if mask is None else mask[:, None, None]
        return DensePart(self.keys.flatten(0, 1), self.values.flatten(0, 1), bias)


def _holds(buffer: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a buffer can hold numbers of another type: under autocast it may be narrower."""
    return buffer.dtype == dtype or torch.promote_types(buffer.dtype, dtype) == buffer.dtype


def _with_room(x: Tensor, room: int, new: torch.dtype | None = None) -> Tensor:
    """Copy ``x [B, H, N, ...]`` with ``room`` more slots, which can hold a ``new`` type, too."""
    b, h, n = x.shape[:3]
    shape, dtype = (b, h, n + room, *x.shape[3:]), x.dtype
    dtype = dtype if new is None else torch.promote_types(dtype, new)
    with torch.no_grad():
        buffer = torch.empty(shape, dtype=dtype, device=x.device)
        buffer[:, :, :n] = x
    return buffer
