"""Segments in host memory, and their way there and back.

A segment never changes: it is copied to the host once, when it is made. All of its numbers are in
one buffer, so that one copy brings it to its device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from cachepress.cache.codec import Quantized, changed, floats
from cachepress.cache.segment import Segment
from cachepress.errors import UnsupportedError
from cachepress.ops import storing
from cachepress.ops.paged_attention import Layout

_Kind = TypeVar("_Kind", bound=Segment)
_HOST = torch.device("cpu")
_ALIGNED = 256
"""Bytes that tensors in a buffer begin at a multiple of, as those of PyTorch's allocators do."""


@dataclass
class Packed:
    """The memory of a segment on the host, and what stays on the device.

    Attributes:
        buffer: all numbers of the segment, as bytes; pinned where a GPU reads it.
        layout: the page table on the device.
        written: what has to happen before the host may read the buffer; None if it did.
    """

    buffer: Tensor
    layout: Layout
    written: torch.cuda.Event | None = None


class HostSegment(Segment):
    """Segment in host memory.

    Attributes:
        packed: its memory; None for what was computed from others, until it is stored.
    """

    packed: Packed | None = None

    def join(self, other: Segment) -> Segment:
        """Append the pairs of another segment, on the host."""
        return super().join(_with(other, Segment, lambda x: x.cpu(), _on(other.layout, _HOST)))

    def tensors(self) -> list[Tensor]:
        """List all tensors that are allocated, the page table on the device among them."""
        index = [] if self.packed is None else self.packed.layout.tensors()
        return [*super().tensors(), *index]

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle without the buffer, which would come along with each tensor in it."""
        device = _HOST if self.packed is None else self.packed.layout.device
        return to_host, (_with(self, Segment, Tensor.clone, self.layout), device)


@storing
def to_host(segment: Segment, device: torch.device) -> Segment:
    """Copy a segment to the host, which brings it to ``device`` later; once is enough.

    Where the device is the host itself nothing is copied.

    Raises:
        UnsupportedError: if pairs are a part of an autograd graph.
    """
    if device == _HOST or (isinstance(segment, HostSegment) and segment.packed is not None):
        return segment
    if any(floats(x).requires_grad for x in (segment.keys, segment.values)):
        raise UnsupportedError(
            "an offloaded cache is a part of no autograd graph: compress it under torch.no_grad(), "
            "as cachepress.prefill does"
        )
    index = {id(x) for x in segment.layout.tensors()}
    starts, n = {}, 0
    for x in segment.tensors():
        if id(x) not in index:
            starts[id(x)], n = n, n + -(-x.nbytes // _ALIGNED) * _ALIGNED
    is_cuda = device.type == "cuda"
    buffer = torch.empty(n, dtype=torch.uint8, device=_HOST, pin_memory=is_cuda)

    def stored(x: Tensor) -> Tensor:
        return _placed(buffer, starts[id(x)], x).copy_(x, non_blocking=True)

    made = _with(segment, HostSegment, stored, _on(segment.layout, _HOST))
    written = _done_so_far(torch.cuda.current_stream(device)) if is_cuda else None
    vars(made)["packed"] = Packed(buffer, _on(segment.layout, device), written)
    return made


class Transfer:
    """Segments on their way from the host to a device.

    The buffers belong to the stream that reads them. It may have used their memory for something
    else, so that the copying stream waits for it; and they are free again when it has waited for
    the copies, whether or not they were read.

    Args:
        segments: the segments on the host.
        device: where they go.
        ahead: whether other work goes on meanwhile.
    """

    _done: torch.cuda.Event | None = None

    @storing
    def __init__(self, segments: Sequence[HostSegment], device: torch.device, ahead: bool) -> None:
        packed = [segment.packed for segment in segments if segment.packed is not None]
        buffers = [torch.empty(len(x.buffer), dtype=torch.uint8, device=device) for x in packed]
        if ahead and device.type == "cuda":
            self._reader, copying = torch.cuda.current_stream(device), _copying(device)
            copying.wait_stream(self._reader)
            with torch.cuda.stream(copying):
                _copy(packed, buffers)
                self._done = _done_so_far(copying)
        else:
            _copy(packed, buffers)
        each = zip(segments, packed, buffers, strict=True)
        self._there: dict[Segment, Segment] = {
            segment: _unpacked(segment, p.layout, x) for segment, p, x in each
        }

    def arrived(self) -> dict[Segment, Segment]:
        """Let the current stream wait for the segments, and return them by those on the host.

        Another stream than the one that they were copied for gets none of them.
        """
        if self._done is not None:
            if torch.cuda.current_stream(self._reader.device) != self._reader:
                return {}
            self._reader.wait_event(self._done)
            self._done = None
        return self._there

    def tensors(self) -> list[Tensor]:
        """List all tensors that are allocated."""
        return [x for segment in self._there.values() for x in segment.tensors()]

    def __del__(self) -> None:
        """Let nothing use the memory before the copies are done, also where nobody read them."""
        if self._done is not None:
            self._reader.wait_event(self._done)


@lru_cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which segments are copied to a device."""
    return torch.cuda.Stream(device)


def _done_so_far(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _copy(packed: Sequence[Packed], buffers: Sequence[Tensor]) -> None:
    for segment, buffer in zip(packed, buffers, strict=True):
        buffer.copy_(segment.buffer, non_blocking=True)


def _with(
    segment: Segment, kind: type[_Kind], change: Callable[[Tensor], Tensor], layout: Layout
) -> _Kind:
    """Make a segment of other tensors, and with another page table."""

    def with_other(x: object) -> object:
        if isinstance(x, Layout):
            return layout
        return changed(x, change) if isinstance(x, Tensor | Quantized) else x

    parts = {x.name: with_other(getattr(segment, x.name)) for x in fields(Segment)}
    return kind(**parts)  # pyright: ignore[reportArgumentType]


def _unpacked(segment: Segment, layout: Layout, buffer: Tensor) -> Segment:
    """Make the segment whose numbers lie in a copy of the buffer of one on the host."""

    def there(x: Tensor) -> Tensor:
        return _placed(buffer, int(x.storage_offset()) * x.itemsize, x)

    return _with(segment, Segment, there, layout)


def _placed(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """View bytes of a buffer as a tensor."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _on(layout: Layout, device: torch.device) -> Layout:
    return layout if layout.device == device else Layout(layout.lengths, device)
