"""What a recorded step does to the layers of a cache: its kernel appends, and the host only counts.

A layer has parts, each of which the kernel is told of in a table of its own: a compressed layer is
one, joined caches have one for each group of sequences, a sliding-window layer has its window.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple
from weakref import ref

from torch import Tensor

from cachepress.cache.joined import JoinedLayer
from cachepress.cache.kernel import plan_of
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.snapshot import Snapshot
from cachepress.cache.tail import TailRows
from cachepress.cache.window import (
    Window,
    WindowRows,
    can_be_window,
    is_window,
    pairs_of,
    plan_of_window,
    window_of,
)
from cachepress.ops.paged_attention.plan import Form, Plan


class PartForm(NamedTuple):
    """What of the storage of a part a recording is made for.

    Attributes:
        kernel: what the kernel is compiled for.
        batch: sequences.
        heads: KV heads.
        queries: attention heads of each.
        programs: programs of a launch, at least those that the table needs.
        partials: partial results, at least those that the table needs.
        width: numbers of a value.
    """

    kernel: Form
    batch: int
    heads: int
    queries: int
    programs: int
    partials: int
    width: int

    @classmethod
    def of(cls, plan: Plan, shape: tuple[int, int, int], width: int) -> "PartForm":
        """Return the form of a part that is read by a plan, for ``(B, H, G)`` queries."""
        programs, partials = (1 << (n - 1).bit_length() for n in (plan.programs, plan.partials))
        return cls(plan.form, *shape, programs, partials, width)


def can_step(layers: Sequence[object], batch: int, windows: frozenset[int]) -> bool:
    """Tell whether steps can be recorded for a cache of these layers.

    Args:
        layers: the layers.
        batch: sequences of a step.
        windows: the layers whose tokens see a window of the newest ones.
    """
    whole = [layer for layer in layers if isinstance(layer, CompressedLayer)]
    seen = whole[0].get_seq_length() if whole else 0
    return bool(whole) and all(
        _can_step(layer, batch)
        if isinstance(layer, CompressedLayer)
        else i in windows and can_be_window(layer, batch, seen)
        for i, layer in enumerate(layers)
    )


def _can_step(layer: CompressedLayer, batch: int) -> bool:
    kinds = {type(part) for part in _groups(layer)}
    plain = kinds == {CompressedLayer} and type(layer) in (CompressedLayer, JoinedLayer)
    return plain and layer.batch_size == batch and layer.page_budget is None


def _groups(layer: CompressedLayer) -> tuple[CompressedLayer, ...]:
    return layer.groups if isinstance(layer, JoinedLayer) else (layer,)


def make_room(layers: Sequence[object]) -> bool:
    """Make room for a token that a kernel appends to compressed layers, without gradients.

    Returns:
        Whether there is room now: not before a token was appended in the ordinary way.
    """
    whole = [layer for layer in layers if isinstance(layer, CompressedLayer)]
    return all(_make_room(part) for layer in whole for part in _groups(layer))


def _make_room(part: CompressedLayer) -> bool:
    if part._tail is None or part._tail.fixed or not part._plans.group:
        return False
    if part._pages_tail:
        part._page_tail()
    part._tail.make_room()
    return True


def forms_of(layers: Sequence[object]) -> tuple[tuple[PartForm, ...], ...]:
    """Return the forms of the parts of each layer, in which there is room; nothing is moved.

    Raises:
        UnplannedError: if the kernel does not read such pairs.
    """
    queries = _queries(layers)
    return tuple(_forms(layer, queries) for layer in layers)


def _forms(layer: object, queries: int) -> tuple[PartForm, ...]:
    if is_window(layer):
        keys, values = pairs_of(layer)
        plan = plan_of_window(layer, queries)
        b, h = keys.shape[:2]
        return (PartForm.of(plan, (b, h, queries // h), values.shape[3]),)
    assert isinstance(layer, CompressedLayer)
    found = [(plan_of_part(part)[0], part.snapshot) for part in _groups(layer)]
    return tuple(PartForm.of(plan, _shape(held), held.value_width) for plan, held in found)


def parts_of(layers: Sequence[object]) -> list[tuple[CompressedLayer, ...]]:
    """List the parts of each layer, in which there is room; windows are copied to buffers."""
    queries = _queries(layers)
    return [_parts(layer, queries) for layer in layers]


def _parts(layer: object, queries: int) -> tuple[CompressedLayer, ...]:
    if is_window(layer):
        return (window_of(layer, queries),)
    assert isinstance(layer, CompressedLayer)
    return _groups(layer)


def _queries(layers: Sequence[object]) -> int:
    """Count the attention heads of a model by a layer that was attended to."""
    part = next(_groups(layer)[0] for layer in layers if isinstance(layer, CompressedLayer))
    assert part._tail is not None
    return part._plans.group * part._tail.keys.shape[1]


def plan_of_part(part: CompressedLayer) -> tuple[Plan, int]:
    """Find how the kernel reads a part, and the tokens that it got since that was written down."""
    held = part.snapshot
    return plan_of(held, held.device, _shape(held), appends=True)


def _shape(held: Snapshot) -> tuple[int, int, int]:
    return held.batch, held.heads, held.plans.group


def storage_of(part: CompressedLayer) -> tuple[object, ...]:
    """Return a key of where a part's pairs are stored, which changes as soon as they are moved."""
    tail = part._tail
    assert tail is not None
    place = tail.keys.data_ptr(), tail.keys.shape[2], part._seen - tail.n
    return (*map(ref, part._segments), *place)


def with_token(part: CompressedLayer, keys: Tensor, values: Tensor) -> Snapshot:
    """Write a token behind the others, without counting it, and return what it sees."""
    tail = part._tail
    assert tail is not None
    n, held = tail.n, part.snapshot
    tail.keys[:, :, n : n + 1], tail.values[:, :, n : n + 1] = keys, values
    rows = TailRows(tail.keys[:, :, : n + 1], tail.values[:, :, : n + 1])
    if isinstance(held.tail, WindowRows):
        rows = rows.newest(held.tail.window)
    return replace(held, tail=rows, seen=held.seen + 1)


def count_appended(layers: Sequence[object], parts: Sequence[tuple[CompressedLayer, ...]]) -> None:
    """Count a token that a kernel appended to the parts of some layers."""
    for layer, own in zip(layers, parts, strict=True):
        for part in own:
            assert part._tail is not None
            part._tail.n += 1
            part._count(1)
        if isinstance(layer, JoinedLayer):
            layer._count(1)
        elif is_window(layer):
            (window,) = own
            assert isinstance(window, Window)
            window.show(layer)
