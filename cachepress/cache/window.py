"""Sliding windows in buffers with room, to which the kernel of a recorded step appends.

The layers are transformers' own, and stay so: their keys and values become views of a buffer, and
a step writes behind them. Whatever else a layer does replaces these views; then the window is in no
buffer any more, and is copied to a new one for the next recorded step.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeGuard
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers.cache_utils import DynamicSlidingWindowLayer

from cachepress.cache.kernel import cores
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.snapshot import Snapshot
from cachepress.cache.tail import SLACK, Tail, TailRows
from cachepress.ops import storing
from cachepress.ops.paged_attention import Spans
from cachepress.ops.paged_attention.plan import Plan, plan


@dataclass(frozen=True)
class WindowRows(TailRows):
    """Newest pairs of a text, of which the next token sees no more than a window.

    Attributes:
        window: pairs that it sees, its own included.
    """

    window: int = 0

    def spans(self, seen: int) -> Spans:
        """Tell a kernel where the pairs are, when ``seen`` text columns were seen."""
        return replace(super().spans(seen), window=self.window)


class Window(CompressedLayer):
    """What a sliding-window layer holds, as recorded steps read it and append to it.

    Args:
        layer: the layer, whose keys and values become views of the buffer.
        queries: attention heads.
    """

    def __init__(self, layer: DynamicSlidingWindowLayer, queries: int) -> None:
        super().__init__()
        keys, values = pairs_of(layer)
        self._buffer = Tail.of(keys, values, _room(layer) - keys.shape[2])
        self._tail, self._first = self._buffer, 0
        self._batch, self._seen, self._size = len(keys), layer.get_seq_length(), _size(layer)
        self._plans.group = queries // keys.shape[1]
        self._layer, self._keys, self._values = ref(layer), ref(keys), ref(values)
        self.show(layer)

    @property
    def snapshot(self) -> Snapshot:
        """Snapshot of what the buffer holds now, also of what is older than the window."""
        rows = self._buffer.read()
        return replace(super().snapshot, tail=WindowRows(rows.keys, rows.values, self._size))

    def serves(self, layer: DynamicSlidingWindowLayer) -> bool:
        """Tell whether a layer's pairs are still those of the buffer, which has room for one."""
        # A shallow copy of the layer has the same pairs, and must not write to the same slots.
        same = self._layer() is layer and self._keys() is layer.keys
        same = same and self._values() is layer.values and _size(layer) == self._size
        room = self._buffer.n < self._buffer.keys.shape[2]
        return same and room and layer.get_seq_length() == self._seen

    def show(self, layer: DynamicSlidingWindowLayer) -> None:
        """Let a layer hold what it would hold without the buffer."""
        n = self._buffer.n
        if not _keeps_past(layer):
            self._first = max(self._first, n - self._size + 1)
        keys, values = (x[:, :, self._first : n] for x in self._buffer.tensors())
        self._keys, self._values = ref(keys), ref(values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, self._seen
        _WINDOWS[keys] = self


_WINDOWS = WeakIdKeyDictionary()
"""The windows by the keys that layers hold: with these a buffer goes that nobody needs any more."""


@storing
def window_of(layer: DynamicSlidingWindowLayer, queries: int) -> Window:
    """Find the window of a layer, or copy its pairs to a buffer, without gradients.

    Args:
        layer: the layer.
        queries: attention heads.
    """
    found = _WINDOWS.get(layer.keys)
    if isinstance(found, Window) and found.serves(layer):
        return found
    return Window(layer, queries)


def is_window(layer: object) -> TypeGuard[DynamicSlidingWindowLayer]:
    """Tell whether a layer is transformers' own for the newest tokens."""
    return type(layer) is DynamicSlidingWindowLayer


def can_be_window(layer: object, batch: int, seen: int) -> bool:
    """Tell whether a layer, of a text of ``seen`` tokens, holds all that its next token sees."""
    if not is_window(layer) or layer.keys is None or layer.keys.ndim != 4:
        return False
    # A layer whose window is its newest token keeps all others, too.
    fits = _size(layer) > 1 and layer.get_seq_length() == seen and len(layer.keys) == batch
    held, wanted = layer.keys.shape[2], min(seen, _size(layer) - 1)
    return fits and (held >= wanted if _keeps_past(layer) else held == wanted)


def plan_of_window(layer: DynamicSlidingWindowLayer, queries: int) -> Plan:
    """Divide the work of a step like that of the layer's window, which need not be made for it."""
    keys, values = pairs_of(layer)
    b, h, _, d = keys.shape
    types, widths, sizes = (keys.dtype, values.dtype), (d, values.shape[3]), (b, h, queries // h)
    return _plan(keys.device, types, widths, sizes, _room(layer), _size(layer))


@lru_cache
def _plan(
    device: torch.device,
    types: tuple[torch.dtype, torch.dtype],
    widths: tuple[int, int],
    shape: tuple[int, int, int],
    room: int,
    window: int,
) -> Plan:
    keys, values = (
        torch.empty(0, width, dtype=dtype, device="meta")
        for dtype, width in zip(types, widths, strict=True)
    )
    spans = Spans(keys, values, shape[0], 0, stride=room, grows=True, window=window)
    return plan([spans], device, shape, cores(device), appends=True)


def pairs_of(layer: DynamicSlidingWindowLayer) -> tuple[Tensor, Tensor]:
    """Return the keys and values that a layer holds."""
    assert layer.keys is not None and layer.values is not None
    return layer.keys, layer.values


def _room(layer: DynamicSlidingWindowLayer) -> int:
    """Choose the slots of a layer's buffer: as many whatever it holds, unless that is the past."""
    return max(pairs_of(layer)[0].shape[2], _size(layer) - 1) + SLACK


def _size(layer: DynamicSlidingWindowLayer) -> int:
    """Count the pairs that a token sees, its own included."""
    return layer.sliding_window


def _keeps_past(layer: DynamicSlidingWindowLayer) -> bool:
    """Tell whether a layer keeps what is older than its window until it is cropped."""
    return bool(getattr(layer, "record_past", False))
