"""The dense store: every head of a sequence holds the same number of rows."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from cachepress.core import Rows
from cachepress.errors import CachepressError, UnsupportedError
from cachepress.stores.handle import RowsHandle

SLACK = 64
"""Rows of head room that a buffer gets when it is allocated, so that appends do not copy it."""


class Settled(NamedTuple):
    """Bytes held by a store before and after it was last settled, measured from storage."""

    before: int
    after: int


@dataclass
class _Buffers:
    """Storage of ``[B, H, C, ...]`` rows, of which the first ``n`` slots are in use."""

    keys: Tensor
    values: Tensor
    positions: Tensor | None
    n: int
    full: bool

    def columns(self) -> list[Tensor]:
        """The tensors that are really allocated."""
        return [x for x in (self.keys, self.values, self.positions) if x is not None]


class DenseStore(CacheLayerMixin):
    """A transformers cache layer whose rows can be dropped.

    ``get_seq_length()`` is what was *seen*, so positions and masks of the next forward come out
    right; ``lengths`` is what is *held*. Heads of one sequence end in the same slot; a sequence
    that keeps fewer rows than its neighbours in the batch has empty slots in front.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        self._buffers: _Buffers | None = None
        self._seen = 0
        self._settled_at = 0
        self.settled: Settled | None = None

    @classmethod
    def adopt(cls, keys: Tensor | None, values: Tensor | None) -> "DenseStore":
        """A store that holds what an ordinary cache layer held, ``[B, H, T, D]`` each."""
        store = cls()
        if keys is not None and values is not None and keys.numel():
            store._append(keys, values)
        return store

    @property
    def is_initialized(self) -> bool:
        """Whether any row was written."""
        return self._buffers is not None

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 before the first row."""
        return -1 if self._buffers is None else self._buffers.keys.shape[0]

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Held keys ``[B, H, N, D]``; None before the first row."""
        return None if self._buffers is None else self._rows().keys

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Held values ``[B, H, N, E]``; None before the first row."""
        return None if self._buffers is None else self._rows().values

    @property
    def positions(self) -> Tensor:
        """Index in the text of each held row, ``[B, H, N]``, padding included; -1 if empty."""
        return self._rows().text_positions()

    @property
    def lengths(self) -> Tensor:
        """Rows held by each head, ``[B, H]``."""
        return (self.positions >= 0).sum(-1)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the rows, slack and bookkeeping included."""
        if self._buffers is None:
            return 0
        return sum(x.untyped_storage().nbytes() for x in self._buffers.columns())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the rows of a forward, and hand out what attention reads them by."""
        first = not self._seen
        self._append(key_states, value_states)
        rows = Rows(key_states, value_states) if first else self._rows()
        return (
            RowsHandle.of(self, rows, key_states, self._seen),
            RowsHandle.of(self, rows, value_states, self._seen),
        )

    def keep(self, rows: Rows, mask: Tensor) -> None:
        """Hold exactly the rows of ``mask [B, H, T]``, in their order, in new buffers."""
        before = self.nbytes
        counts = mask.sum(-1, keepdim=True)  # [B, H, 1]
        n = int(counts.max())
        order = mask.byte().argsort(dim=-1, stable=True)[..., -n:]  # [B, H, n]
        positions = rows.text_positions().gather(-1, order)
        empty = torch.arange(n, device=mask.device) < n - counts
        batch, heads = (torch.arange(k, device=mask.device) for k in mask.shape[:2])
        at = (batch[:, None, None], heads[:, None], order)
        full = bool((counts == n).all())
        self._write(Rows(rows.keys[at], rows.values[at], positions.masked_fill(empty, -1), full))
        self._settled_at = self._seen
        self.settled = Settled(before, self.nbytes)

    def get_seq_length(self) -> int:
        """Text columns seen, which is where the next token stands."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the attention mask: the whole text and the new tokens."""
        return self._seen + int(query_length), 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` text columns, or all after a positive length.

        Raises:
            CachepressError: if rows would be needed that were dropped when the store was settled.
        """
        target = tokens_to_remove if tokens_to_remove > 0 else self._seen + tokens_to_remove
        if target >= self._seen or self._buffers is None:
            return
        if target < self._settled_at or target < 0:
            raise CachepressError(
                f"cannot crop a compressed cache to {target} tokens: rows before "
                f"{self._settled_at} were dropped when the prompt was compressed; crop to "
                f"{self._settled_at} or more"
            )
        self._buffers.n -= self._seen - target
        self._seen = target

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: buffers are made when the first rows arrive."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the sequences by those of ``beam_idx [B']``, which may repeat."""
        if self._buffers is not None:
            rows = self._rows()
            index = beam_idx.to(rows.keys.device)
            positions = None if rows.positions is None else rows.positions.index_select(0, index)
            keys, values = (x.index_select(0, index) for x in (rows.keys, rows.values))
            self._write(Rows(keys, values, positions, rows.full))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times in a row."""
        self.reorder_cache(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of ``indices`` only."""
        batch = torch.arange(max(self.batch_size, 0), device=indices.device)
        self.reorder_cache(batch[indices] if self.is_initialized else batch)

    def offload(self) -> None:
        """Refused: the attention function reads the rows where they are."""
        raise UnsupportedError("a compressed cache cannot be offloaded: use DynamicCache()")

    prefetch = offload

    def _rows(self) -> Rows:
        buffers = self._buffers
        if buffers is None:
            raise CachepressError("the store is empty: run a forward with it first")
        used = slice(buffers.n)
        positions = None if buffers.positions is None else buffers.positions[:, :, used]
        return Rows(buffers.keys[:, :, used], buffers.values[:, :, used], positions, buffers.full)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        n_new = keys.shape[2]
        buffers = self._buffers
        if buffers is None:
            self._write(Rows(keys, values))
        else:
            if buffers.n + n_new > buffers.keys.shape[2]:
                buffers = self._write(self._rows(), room=n_new + SLACK)
            new = slice(buffers.n, buffers.n + n_new)
            with torch.no_grad():
                buffers.keys[:, :, new] = keys
                buffers.values[:, :, new] = values
                if buffers.positions is not None:
                    device = buffers.positions.device
                    columns = torch.arange(self._seen, self._seen + n_new, device=device)
                    buffers.positions[:, :, new] = columns
            buffers.n += n_new
        self._seen += n_new

    def _write(self, rows: Rows, room: int = SLACK) -> _Buffers:
        """Put rows into fresh buffers with ``room`` more slots."""
        positions = None if rows.positions is None else _with_room(rows.positions, room)
        self._buffers = _Buffers(
            keys=_with_room(rows.keys, room),
            values=_with_room(rows.values, room),
            positions=positions,
            n=rows.keys.shape[2],
            full=rows.full,
        )
        return self._buffers


def _with_room(x: Tensor, room: int) -> Tensor:
    """A copy of ``x [B, H, N, ...]`` with ``room`` more slots, usable in every grad mode."""
    b, h, n = x.shape[:3]
    with torch.inference_mode(False), torch.no_grad():
        buffer = torch.empty(b, h, n + room, *x.shape[3:], dtype=x.dtype, device=x.device)
    with torch.no_grad():
        buffer[:, :, :n] = x
    return buffer
