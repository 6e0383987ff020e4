"""What a recorded step does to a compressed layer: its kernel appends, and the host only counts."""

from dataclasses import replace
from weakref import ref

from torch import Tensor

from cachepress.cache.layer import CompressedLayer
from cachepress.cache.snapshot import Snapshot
from cachepress.cache.tail import TailRows


def make_room(layer: CompressedLayer) -> bool:
    """Make room for a token that a kernel appends, without gradients.

    Returns:
        Whether there is room now: not before a token was appended in the ordinary way.
    """
    if layer._tail is None or layer._tail.fixed or not layer._plans.group:
        return False
    if layer._pages_tail:
        layer._page_tail()
    layer._tail.make_room()
    return True


def storage_of(layer: CompressedLayer) -> tuple[object, ...]:
    """Return a key of where a layer's pairs are stored, which changes as soon as they are moved."""
    tail = layer._tail
    assert tail is not None
    return (*map(ref, layer._segments), tail.keys.data_ptr(), tail.keys.shape[2])


def with_token(layer: CompressedLayer, keys: Tensor, values: Tensor) -> Snapshot:
    """Write a token behind the others, without counting it, and return what is held with it."""
    tail = layer._tail
    assert tail is not None
    n, held = tail.n, layer.snapshot
    tail.keys[:, :, n : n + 1], tail.values[:, :, n : n + 1] = keys, values
    rows = TailRows(tail.keys[:, :, : n + 1], tail.values[:, :, : n + 1])
    return replace(held, tail=rows, seen=held.seen + 1)


def count_appended(layer: CompressedLayer) -> None:
    """Count a token that a kernel appended."""
    assert layer._tail is not None
    layer._tail.n += 1
    layer._count(1)
