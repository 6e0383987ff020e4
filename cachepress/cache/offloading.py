"""Offloaded layers: their segments are in host memory, and come to the device for each forward.

While a layer computes, the segments of the next one are copied to the device on a stream of their
own, so that those of at most two layers are there at once. The tail stays on the device.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from weakref import ref

import torch
from torch import Tensor

from cachepress.cache.host import HostSegment, Transfer, to_host
from cachepress.cache.hybrid import CompressedHybridLayer
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.masks import TextMask
from cachepress.cache.pairs import Pairs
from cachepress.cache.segment import Segment
from cachepress.cache.snapshot import Snapshot
from cachepress.ops import AttentionRule, storing


class Prefetch:
    """What is brought to the device next: the layers around a layer, and its own segments.

    Attributes:
        device: where the layer's pairs are read; None if that is not known yet.
        before: the layer whose forward comes before; None if it is not known.
        after: the layer whose forward comes next.
        ahead: the layer's own segments, if they were asked for ahead of time.
        reached: whether a forward appended to the layer, and is about to take a snapshot of it.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device, self.reached = device, False
        self.before: ref[OffloadedLayer] | None = None
        self.after: ref[OffloadedLayer] | None = None
        self.ahead: Transfer | None = None


class Arrival:
    """The segments of a layer on its device, brought there when they are first read.

    Whoever reads them holds this, and nothing else does: afterwards their memory is free.

    Args:
        layer: the layer.
        held: the segments on the host.
        forward: whether a forward reads them, which reaches the next layer after this one.
    """

    def __init__(self, layer: "OffloadedLayer", held: tuple[Segment, ...], forward: bool) -> None:
        self._layer, self._held, self._forward = layer, held, forward

    @property
    def device(self) -> torch.device | None:
        """The device; None if it is not known yet."""
        return self._layer._prefetch.device

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The segments."""
        return self._layer.bring(self._held, self._forward)


@dataclass(frozen=True)
class OffloadedSnapshot(Snapshot):
    """Snapshot of an offloaded layer: its segments are those on the host.

    Attributes:
        arrival: the same segments on the device.
    """

    arrival: Arrival = field(kw_only=True, compare=False)

    def rows(self) -> Pairs:
        """Return all pairs as one table on the device, ``[B, H, T, ...]``."""
        return self._there().rows()

    def attend(self, query: Tensor, mask: TextMask, rule: AttentionRule) -> Tensor:
        """Compute attention over all pairs, on the device."""
        return self._there().attend(query, mask, rule)

    @property
    def device(self) -> torch.device:
        """Where the pairs are read."""
        return self.arrival.device or super().device

    def _there(self) -> Snapshot:
        held = {x.name: getattr(self, x.name) for x in fields(Snapshot)}
        return Snapshot(**{**held, "segments": self.arrival.segments})


class OffloadedLayer(CompressedLayer):
    """Compressed layer whose segments are in host memory."""

    def __init__(self) -> None:
        self._prefetch = Prefetch()
        super().__init__()

    @property
    def _segments(self) -> tuple[Segment, ...]:
        """Segments on the host, which may be read there."""
        segments = vars(self)["_segments"]
        for segment in segments:
            packed = segment.packed if isinstance(segment, HostSegment) else None
            if packed is not None and packed.written is not None:
                packed.written.synchronize()
                packed.written = None
        return segments

    @_segments.setter
    def _segments(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, segments: tuple[Segment, ...]
    ) -> None:
        device = self._prefetch.device
        vars(self)["_segments"] = tuple(to_host(x, device or x.layout.device) for x in segments)

    @property
    def snapshot(self) -> OffloadedSnapshot:
        """Snapshot of what the layer holds now; reading it brings the segments to the device."""
        held = super().snapshot
        parts = {x.name: getattr(held, x.name) for x in fields(held)}
        forward, self._prefetch.reached = self._prefetch.reached, False
        return OffloadedSnapshot(**parts, arrival=Arrival(self, held.segments, forward))

    def bring(self, held: tuple[Segment, ...], forward: bool) -> tuple[Segment, ...]:
        """Bring segments to the device, and the next layer's while a forward computes this one."""
        prefetch = self._prefetch
        ahead, prefetch.ahead = prefetch.ahead, None
        there = {} if ahead is None else ahead.arrived()
        missing = [x for x in held if isinstance(x, HostSegment) and x not in there]
        if missing and prefetch.device is not None:
            there = {**there, **Transfer(missing, prefetch.device, ahead=False).arrived()}
        after = prefetch.after if forward else None
        if after is not None and (layer := after()) is not None:
            layer.bring_ahead()
        return tuple(there.get(x, x) for x in held)

    def bring_ahead(self) -> None:
        """Begin to bring the segments to the device, for a forward that will read them soon."""
        prefetch = self._prefetch
        held = [x for x in self._segments if isinstance(x, HostSegment)]
        if held and prefetch.device is not None and prefetch.ahead is None:
            prefetch.ahead = Transfer(held, prefetch.device, ahead=True)

    @storing
    def restore(self) -> None:
        """Store pairs as the model computed them, in a segment, if none was ever evicted."""
        if not self._compressed_at and self._tail is not None:
            self._freeze()

    def form(self) -> tuple[object, ...]:
        """Return what must be equal for layers to be stacked."""
        return ("offloaded", *super().form())

    def tensors(self) -> list[Tensor]:
        """List all tensors that are allocated, on the host and on the device."""
        ahead = self._prefetch.ahead
        return super().tensors() + ([] if ahead is None else ahead.tensors())

    def host_tensors(self) -> list[Tensor]:
        """List those in host memory: the segments."""
        return [x for segment in self._segments for x in Segment.tensors(segment)]

    def link(self, after: "OffloadedLayer") -> None:
        """Bring another layer's segments to the device while this one computes."""
        self._prefetch.after, after._prefetch.before = ref(after), ref(self)

    def __deepcopy__(self, memo: dict[int, object]) -> "OffloadedLayer":
        """Fork the layer; where the one before was copied with it they are linked as well."""
        forked = super().__deepcopy__(memo)
        before = self._prefetch.before
        copied = None if before is None else memo.get(id(before()))
        if isinstance(copied, OffloadedLayer):
            copied.link(forked)
        return forked

    def __getstate__(self) -> dict[str, object]:
        """Leave out, in copies and pickles, what is on its way, and for which layers."""
        state = {**vars(self), "_segments": self._segments}
        return {**state, "_prefetch": Prefetch(self._prefetch.device)}

    def _append(self, keys: Tensor, values: Tensor) -> None:
        self._prefetch.device = keys.device
        super()._append(keys, values)
        self._prefetch.reached = True


class OffloadedHybridLayer(  # pyright: ignore[reportIncompatibleVariableOverride]
    OffloadedLayer, CompressedHybridLayer
):
    """Offloaded layer with a recurrent state beside its pairs, which stays on the device."""


_KINDS: dict[type, type[OffloadedLayer]] = {
    CompressedLayer: OffloadedLayer,
    CompressedHybridLayer: OffloadedHybridLayer,
}


def offloaded(layer: CompressedLayer) -> CompressedLayer:
    """Make the offloaded layer that goes on where a compressed one is."""
    kind = _KINDS.get(type(layer))
    if kind is None:
        return layer
    made, state = kind(), dict(vars(layer))
    segments: tuple[Segment, ...] = state.pop("_segments")
    made.__setstate__({**state, "_prefetch": made._prefetch})
    if layer.is_initialized:
        made._prefetch.device = layer.snapshot.device
    made._segments = segments
    return made


def link(layers: Iterable[object]) -> None:
    """Let the segments of offloaded layers be prefetched in this order."""
    for layer, after in pairwise(x for one in layers for x in _offloaded_in(one)):
        layer.link(after)


def host_tensors(layer: object) -> list[Tensor]:
    """List the tensors of a cache layer that are offloaded to host memory."""
    return [x for one in _offloaded_in(layer) for x in one.host_tensors()]


def _offloaded_in(layer: object) -> list["OffloadedLayer"]:
    """List the offloaded layers that a cache layer consists of."""
    return [x for x in getattr(layer, "groups", (layer,)) if isinstance(x, OffloadedLayer)]
