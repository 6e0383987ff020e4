"""Rows that no longer change: what a settled layer holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.forward import Rows
from cachepress.ops.ragged_attention import PAGE, DensePart, Layout, PagedPart, Part
from cachepress.stores.codec import Codec, Quantized


@dataclass(frozen=True)
class Block:
    """Rows of each sequence and KV head, every head with its own number of them, in pages.

    A head costs its own rows and what is left of its last page. A block is never written to, so
    any number of caches can hold it.

    Attributes:
        shape: ``(B, H)``.
        layout: where each head's rows are.
        keys: ``[P, C, D]``, as they are or quantized; of some channels only, where there are
            ``channels``.
        values: ``[P, C, E]``, as they are or quantized.
        positions: ``[P, C]`` index of each row in the text, -1 in an unused slot.
        rope: ``[P, C]`` position that each key is rotated to; None where it is the position.
        carried: ``[P, C]`` what a press left with each row; None for no row.
        channels: ``[B * H, D']`` the channels of the keys that are stored, ascending; None for all.
        width: channels of a key, stored or not.
    """

    shape: tuple[int, int]
    layout: Layout
    keys: Tensor | Quantized
    values: Tensor | Quantized
    positions: Tensor
    rope: Tensor | None = None
    carried: Tensor | None = None
    channels: Tensor | None = None
    width: int = 0

    def __post_init__(self) -> None:
        # The index is made with the block, so that the bytes are there from the start.
        self.layout.tensors()

    @classmethod
    def of(
        cls,
        rows: Rows,
        mask: Tensor,
        codec: Codec | None = None,
        channels: Tensor | None = None,
    ) -> "Block":
        """The rows of ``mask [B, H, T]``, in their order, with some ``channels [B, H, D]``."""
        b, h, _ = mask.shape
        layout = Layout(tuple(mask.sum(-1).flatten().tolist()), mask.device)
        slots = layout.slots

        def paged(x: Tensor, empty: int = 0) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                size = (layout.n_pages * PAGE, *x.shape[3:])
                pages = torch.full(size, empty, dtype=x.dtype, device=x.device)
            with torch.no_grad():
                pages[slots] = x[mask]
            return pages.view(layout.n_pages, PAGE, *x.shape[3:])

        chosen = None if channels is None else _indices(channels)
        keys, values = paged(_picked(rows.keys, chosen)), paged(rows.values)
        positions = paged(rows.text_positions().int(), -1)
        return cls(
            shape=(b, h),
            layout=layout,
            keys=keys if codec is None else codec.encode_keys(keys, positions >= 0),
            values=values if codec is None else codec.encode_values(values),
            positions=positions,
            rope=None if rows.rope is None else paged(rows.rope.int(), -1),
            carried=None if rows.carried is None else paged(rows.carried.float()),
            channels=None if chosen is None else chosen.flatten(0, 1),
            width=rows.keys.shape[-1],
        )

    def rows(self) -> Rows:
        """All rows as a table ``[B, H, longest, ...]``; a view where all heads hold the same."""
        columns = (
            _decoded(self.keys),
            _decoded(self.values),
            self.positions,
            self.rope,
            self.carried,
        )
        n = self.layout.even
        if n is not None:
            tables = [None if x is None else self._spans(x)[:, :, :n] for x in columns]
            keys, values, positions, rope, carried = tables
            return Rows(self._whole(keys), values, positions, rope=rope, carried=carried)  # pyright: ignore[reportArgumentType]
        table, real = self.layout.padded()
        tables = [
            None if x is None else x.flatten(0, 1)[table].unflatten(0, self.shape) for x in columns
        ]
        keys, values, positions, rope, carried = tables
        hidden = ~real.unflatten(0, self.shape)
        positions = positions.masked_fill(hidden, -1)  # pyright: ignore[reportOptionalMemberAccess]
        keys = self._whole(keys)
        return Rows(keys, values, positions, full=False, rope=rope, carried=carried)  # pyright: ignore[reportArgumentType]

    def part(self, mask: Tensor | None) -> Part:
        """The rows as attention reads them.

        Args:
            mask: added to the logits, ``[B', n, S]`` over text columns; None if all are visible.
        """
        n = self.layout.even
        keys, values = _decoded(self.keys), _decoded(self.values)
        if n is None:
            bias = None if mask is None else self._bias(mask)
            return PagedPart(keys, values, self.layout, bias, self.channels)
        bias = None if mask is None else _of_columns(mask, self._spans(self.positions)[:, :, :n])
        keys, values = (self._spans(x)[:, :, :n].flatten(0, 1) for x in (keys, values))
        return DensePart(keys, values, bias, self.channels)

    def select(self, sequences: Tensor) -> "Block":
        """The block of some of the sequences ``[B']``, which may repeat."""
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
            keys=_paged(self.keys, lambda x: x[pages]),
            values=_paged(self.values, lambda x: x[pages]),
            positions=self.positions[pages],
            rope=None if self.rope is None else self.rope[pages],
            carried=None if self.carried is None else self.carried[pages],
            channels=None if self.channels is None else self._channels_of(wanted),
        )

    def join(self, other: "Block") -> "Block":
        """The block with the rows of another one after its own; both have full pages only."""
        spans = len(self.layout.lengths)

        def joined(x: Tensor, y: Tensor) -> Tensor:
            pages = (z.view(spans, -1, *z.shape[1:]) for z in (x, y))
            return torch.cat(list(pages), dim=1).flatten(0, 1)

        lengths = zip(self.layout.lengths, other.layout.lengths, strict=True)
        return replace(
            self,
            layout=Layout(tuple(a + b for a, b in lengths), self.layout.device),
            keys=_joined(self.keys, other.keys, joined),
            values=_joined(self.values, other.values, joined),
            positions=joined(self.positions, other.positions),
        )

    def tensors(self) -> Sequence[Tensor]:
        """Everything that is allocated."""
        others = (self.positions, self.rope, self.carried, self.channels)
        columns = [x for x in others if x is not None]
        for x in (self.keys, self.values):
            columns += x.tensors() if isinstance(x, Quantized) else [x]
        return columns + self.layout.tensors()

    def _whole(self, keys: Tensor | None) -> Tensor | None:
        """Keys ``[B, H, n, D]`` with zeros in the channels that are not stored."""
        if self.channels is None or keys is None:
            return keys
        b, h, n, _ = keys.shape
        index = self.channels.view(b, h, 1, -1).expand(-1, -1, n, -1)
        return keys.new_zeros(b, h, n, self.width).scatter(-1, index, keys)

    def _channels_of(self, sequences: list[int]) -> Tensor | None:
        if self.channels is None:
            return None
        return self.channels.unflatten(0, self.shape)[sequences].flatten(0, 1)

    def _spans(self, x: Tensor) -> Tensor:
        """Pages of even spans as a table ``[B, H, slots, ...]``."""
        b, h = self.shape
        return x.reshape(b, h, -1, *x.shape[2:])

    def _bias(self, mask: Tensor) -> Tensor:
        """A mask over text columns as one over the slots of the longest span."""
        layout = self.layout
        table = self.positions.new_full((len(layout.lengths), layout.most_pages, PAGE), -1)
        table[layout.span, layout.page] = self.positions
        return _of_columns(mask, table.view(*self.shape, -1))


def _of_columns(mask: Tensor, positions: Tensor) -> Tensor:
    """A mask ``[B, n, S]`` at ``positions [B or 1, H, N]``, as a bias ``[B, H, 1, n, N]``."""
    b, n, s = mask.shape
    h = positions.shape[1]
    column = positions.clamp(min=0).long().expand(b, -1, -1)[:, :, None]
    picked = mask[:, None].expand(b, h, n, s).gather(-1, column.expand(-1, -1, n, -1))
    return picked.unsqueeze(2)


def _indices(channels: Tensor) -> Tensor:
    """The chosen of ``channels [B, H, D]``, as many in every head, ``[B, H, D']``."""
    return channels.nonzero()[:, -1].view(*channels.shape[:2], -1)


def _picked(keys: Tensor, chosen: Tensor | None) -> Tensor:
    """The chosen channels ``[B, H, D']`` of keys ``[B, H, T, D]``."""
    if chosen is None:
        return keys
    return keys.gather(-1, chosen.unsqueeze(2).expand(-1, -1, keys.shape[2], -1))


def _decoded(x: Tensor | Quantized) -> Tensor:
    return x.decode() if isinstance(x, Quantized) else x


def _paged(x: Tensor | Quantized, change: Callable[[Tensor], Tensor]) -> Tensor | Quantized:
    return x.pages(change) if isinstance(x, Quantized) else change(x)


def _joined(
    x: Tensor | Quantized, y: Tensor | Quantized, join: Callable[[Tensor, Tensor], Tensor]
) -> Tensor | Quantized:
    if isinstance(x, Quantized) and isinstance(y, Quantized):
        codes, scale, zero = map(join, x.tensors(), y.tensors())
        return replace(x, codes=codes, scale=scale, zero=zero)
    assert isinstance(x, Tensor) and isinstance(y, Tensor)
    return join(x, y)
