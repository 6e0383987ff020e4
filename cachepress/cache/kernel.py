"""Lets the GPU's kernel attend over what a compressed layer holds.

It is told where pairs are by a table, which is made when the layer's storage changes and not when a
token is decoded. Nothing here asks the device for a number.
"""

from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cachepress.cache.masks import TextMask
from cachepress.cache.segment import Segment
from cachepress.ops import AttentionRule, wide
from cachepress.ops.paged_attention import PAGE, Spans
from cachepress.ops.paged_attention.plan import Plan, UnplannedError, plan

if TYPE_CHECKING:
    from cachepress.cache.snapshot import Snapshot

_HAS_TRITON = find_spec("triton") is not None
_MOST_ADDED = 4096
"""Tokens that a tail may have grown by before the work is divided anew."""


class Plans:
    """The plan of a layer's last step, which holds as long as its storage stays the same.

    Attributes:
        group: queries of each KV head and token, as far as the layer was attended to; else 0.
        pages: the pages that are read of each segment, and the pairs in them.
    """

    def __init__(self) -> None:
        self.group = 0
        self._key: object = None
        self._plan: Plan | None = None
        self.pages: list[tuple[Tensor, ...]] = []

    def __reduce__(self) -> tuple[type["Plans"], tuple[()]]:
        """Pickle and copy as one that has no plan yet."""
        return Plans, ()

    def find(self, key: object) -> Plan | None:
        """Return the plan that was made for this storage, if it was the last one."""
        return self._plan if self._key == key else None

    def remember(self, key: object, made: Plan) -> None:
        """Keep a plan until the storage changes; its memory is what the key's addresses name."""
        self._key, self._plan = key, made

    def forget(self) -> None:
        """Let the next step make a plan of its own."""
        self._key = self._plan = None

    def anew(self) -> "Plans":
        """Return one without a plan, for a layer that goes on elsewhere."""
        made = Plans()
        made.group = self.group
        return made

    def tensors(self) -> list[Tensor]:
        """List what is allocated on the device for the kernel."""
        found = [x for pages in self.pages for x in pages]
        return found if self._plan is None else [*found, *self._plan.tensors()]


def is_usable(query: Tensor) -> bool:
    """Tell whether the kernel can run for such queries."""
    return query.is_cuda and can_compute(query.dtype)


def can_compute(dtype: torch.dtype) -> bool:
    """Tell whether the kernel can be launched for numbers of a type."""
    return _HAS_TRITON and dtype != torch.float64


def attend(held: "Snapshot", query: Tensor, mask: TextMask, rule: AttentionRule) -> Tensor | None:
    """Compute attention of ``query [B, H * G, n, D]`` by the kernel, ``[B, n, H * G, E]``.

    Returns:
        None where the kernel does not go: gradients, keys of some channels, pairs of several types.
    """
    if held.records_gradients(query, rule):
        return None
    from cachepress.ops.paged_attention.triton import triton_attention

    b, hq, n, _ = query.shape
    shape = (b, held.heads, hq // held.heads * n)
    try:
        found, added = _plan(held, query, mask, rule, shape)
    except UnplannedError:
        return None
    bias = None if mask.is_causal else mask.by_head[:, 0]
    count = _counts(query.device)[added : added + 1]
    return triton_attention(query, found, rule, held.heads, held.value_width, count, bias=bias)


def _plan(
    held: "Snapshot",
    query: Tensor,
    mask: TextMask,
    rule: AttentionRule,
    shape: tuple[int, int, int],
) -> tuple[Plan, int]:
    """Find the plan of a snapshot, and how far its tail has grown since that was made."""
    chooses = held.page_budget is not None and query.shape[2] == 1
    found, since = plan_of(held, query.device, shape, held.page_budget if chooses else None)
    if chooses:
        _choose(held, query, mask, rule)
    return found, since


def plan_of(
    held: "Snapshot",
    device: torch.device,
    shape: tuple[int, int, int],
    page_budget: int | None = None,
    appends: bool = False,
) -> tuple[Plan, int]:
    """Find the plan of a snapshot, or make one.

    Args:
        held: the snapshot.
        device: where it is.
        shape: ``(B, H, M)``: sequences, KV heads, and queries of each of these spans.
        page_budget: pages that are read of each span; None for all.
        appends: whether the kernel appends a token to the tail.

    Returns:
        The plan, and the tokens by which the tail has grown since it was made.

    Raises:
        UnplannedError: if the kernel does not read such pairs.
    """
    plans, n = held.plans, 0 if held.tail is None else held.tail.keys.shape[2]
    key = (held.storage, shape, page_budget, appends)
    found = plans.find(key)
    since = 0 if found is None else n - found.grown
    if found is not None and 0 <= since < _MOST_ADDED:
        return found, since
    if page_budget is not None:
        plans.pages = _room(held)
    listed = [()] * len(held.segments) if page_budget is None else plans.pages
    parts = [spans_of(s, *pages) for s, pages in zip(held.segments, listed, strict=True)]
    if held.tail is not None:
        parts.append(held.tail.spans(held.seen))
    found = plan(parts, device, shape, cores(device), appends)
    plans.remember(key, found)
    return found, 0


def spans_of(segment: Segment, pages: Tensor | None = None, lengths: Tensor | None = None) -> Spans:
    """Tell the kernel where the pairs of a segment are.

    Args:
        segment: the segment.
        pages: ``[X, pages]`` int32, those that are read, for each sequence of a batch and head;
            None for all.
        lengths: ``[X]`` int32, pairs in these pages.

    Raises:
        UnplannedError: if its keys are stored in some channels only.
    """
    if segment.key_channels is not None:
        raise UnplannedError("keys of some channels")
    layout, even = segment.layout, segment.layout.even
    uneven = pages is None and even is None
    return Spans(
        keys=segment.keys,
        values=segment.values,
        sequences=segment.shape[0],
        longest=max(layout.lengths, default=0) if pages is None else pages.shape[1] * PAGE,
        starts=layout.starts if uneven else None,
        lengths=layout.counts if uneven else lengths,
        stride=0 if even is None else -(-even // PAGE) * PAGE,
        positions=segment.positions,
        bias=segment.bias,
        pages=pages,
    )


@lru_cache
def _counts(device: torch.device) -> Tensor:
    """Return the numbers from 0 on, on a device: none of them has to be brought there later."""
    with torch.inference_mode(False):
        return torch.arange(_MOST_ADDED, dtype=torch.int32, device=device)


def cores(device: torch.device) -> int:
    """Count the multiprocessors of a device."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _room(held: "Snapshot") -> list[tuple[Tensor, ...]]:
    """Make room for the pages that each span reads of each segment, and for how many pairs."""
    return [_room_of(segment, held) for segment in held.segments]


def _room_of(segment: Segment, held: "Snapshot") -> tuple[Tensor, ...]:
    assert held.page_budget is not None
    if not segment.bounded or not segment.layout.n_pages:
        return ()
    spans, device = held.batch * held.heads, segment.layout.device
    most = min(held.page_budget, segment.layout.most_pages)
    pages = torch.zeros(spans, most, dtype=torch.int32, device=device)
    return pages, torch.zeros(spans, dtype=torch.int32, device=device)


def _choose(held: "Snapshot", query: Tensor, mask: TextMask, rule: AttentionRule) -> None:
    """Write down the pages that a query reads, those with the highest bounds of its logits."""
    assert held.page_budget is not None
    b, d = query.shape[0], query.shape[-1]
    spans = wide(query.detach()).reshape(b * held.heads, -1, d)
    bias = mask.of_rows(held.start, held.text_valid)
    places = [i for i, pages in enumerate(held.plans.pages) if pages]
    segments = [held.segments[i] for i in places]
    chosen = held.chosen_pages(segments, spans, bias, held.page_budget, rule)
    for place, segment, some in zip(places, segments, chosen, strict=True):
        pages, lengths = held.plans.pages[place]
        layout, repeats = segment.layout, len(pages) // len(segment.layout.lengths)
        rank = torch.arange(some.shape[1], device=some.device).expand_as(some)
        first, counts = layout.first_page.repeat(repeats), layout.counts.repeat(repeats)
        ordered = rank.masked_fill(~some, some.shape[1]).sort(dim=-1).values[:, : pages.shape[1]]
        pages.copy_(ordered + first[:, None])
        last = (counts - 1).clamp(min=0) // PAGE
        unused = (last + 1) * PAGE - counts
        has_last = some.gather(-1, last[:, None].long()).squeeze(-1)
        lengths.copy_(some.sum(-1) * PAGE - unused * has_last)
