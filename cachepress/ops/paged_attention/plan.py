"""The table by which one launch of the kernel finds all pairs of a layer, and divides the work.

Addresses, lengths and counts are numbers in a tensor on the device, and no arguments of the launch:
a launch that was recorded reads whatever the table says when it is replayed. Nothing in it changes
while tokens are decoded, but for how far the newest ones have grown, which is counted elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from cachepress.ops.paged_attention.spans import Coded, Spans

MOST_GROUPS, MOST_PARTS = 4, 12
MOST_SPLITS = 64
"""Programs that share the rows of a span; a span has as many partial results."""
GROUPS_AT, PARTS_AT, RECORD = 8, 8 + 16 * 4, 16
WORDS = PARTS_AT + RECORD * MOST_PARTS
_PROGRAMS_A_CORE = 4
_LARGEST_TILE = 64
_BYTES_OF_A_BLOCK = 1 << 14


class UnplannedError(Exception):
    """Says that the kernel does not read such parts."""


@dataclass(frozen=True)
class Form:
    """What the kernel is compiled for.

    Attributes:
        dtype: of keys and values.
        block: rows that a program reads at a time.
        tile: queries of a span that a program attends for.
        bits: of quantized parts; 0 where there are none.
        key_steps: type of the scales of quantized keys.
        value_steps: type of the scales of quantized values.
        value_group: channels of a quantized value that share a scale.
        biased: whether a part has a bias.
        paged: whether a part is read by a list of pages.
        window: rows that an appended token sees, its own included; 0 for all.
    """

    dtype: torch.dtype
    block: int = 64
    tile: int = 16
    bits: int = 0
    key_steps: torch.dtype = torch.float16
    value_steps: torch.dtype = torch.float16
    value_group: int = 0
    biased: bool = False
    paged: bool = False
    window: int = 0


@dataclass(frozen=True)
class Plan:
    """A table, with what a launch has to know of it.

    It does not keep the memory alive that the table tells addresses of.

    Attributes:
        words: the table's numbers; see ``_group_words`` and ``_part_words``.
        device: where it is read.
        form: what the kernel is compiled for.
        programs: programs of the launch.
        partials: partial results that they leave, one for each query, group of parts and split.
        splits: most partial results of a query in a group.
        grown: rows of the part that grows, when the plan was made.
    """

    words: tuple[int, ...]
    device: torch.device
    form: Form
    programs: int
    partials: int
    splits: int
    grown: int

    @cached_property
    def table(self) -> Tensor:
        """The table on the device, ``[WORDS]`` int64."""
        table = torch.tensor(self.words, dtype=torch.int64)
        if self.device.type != "cuda":
            return table
        return table.pin_memory().to(self.device, non_blocking=True)

    def tensors(self) -> list[Tensor]:
        """List what is allocated on the device: the table, once a launch has asked for it."""
        return [self.table] if "table" in vars(self) else []


class RecordedPlan(NamedTuple):
    """A plan whose table is written anew for each cache; sizes are the most that it may need."""

    table: Tensor
    form: Form
    programs: int
    partials: int
    splits: int


@dataclass(frozen=True)
class _Group:
    """Parts of the same sequences, which the same queries read.

    Attributes:
        parts: the parts.
        first: the place of the first of them among all parts.
        spans: sequences and KV heads that have rows.
        rows: queries of each span.
        tiles: tiles of these queries.
        each: blocks of rows that a program reads.
        splits: programs of the longest span, for each tile.
    """

    parts: list[Spans]
    first: int
    sequences: int
    spans: int
    rows: int
    tiles: int
    each: int
    splits: int

    @property
    def programs(self) -> int:
        return self.spans * self.tiles * self.splits

    @property
    def partials(self) -> int:
        return self.spans * self.rows * self.splits


def plan(
    parts: Sequence[Spans],
    device: torch.device,
    shape: tuple[int, int, int],
    cores: int,
    appends: bool = False,
) -> Plan:
    """Lay out the table of some parts.

    Args:
        parts: the parts.
        device: where they are.
        shape: ``(B, H, M)``: sequences, KV heads, and queries of each of these spans.
        cores: multiprocessors of the device.
        appends: whether the kernel appends a token to the part that grows.

    Raises:
        UnplannedError: if there are too many, or quantized ones of several forms.
    """
    form = _form(parts)
    groups = _groups(parts, shape, form, cores, appends)
    tile, window = _tile(max(group.rows for group in groups)), max(part.window for part in parts)
    form = replace(form, tile=tile, window=window)
    ordered = [part for group in groups for part in group.parts]
    if len(groups) > MOST_GROUPS or len(ordered) > MOST_PARTS:
        raise UnplannedError(f"{len(groups)} groups of {len(ordered)} parts")
    words = [0] * WORDS
    words[0] = len(groups)
    programs = [0, *accumulate(group.programs for group in groups)]
    partials = [0, *accumulate(group.partials for group in groups)]
    for i, group in enumerate(groups):
        at = GROUPS_AT + RECORD * i
        own = appends and group.sequences == shape[0]
        words[at : at + RECORD] = _group_words(group, programs[i], partials[i], own)
    for i, part in enumerate(ordered):
        at = PARTS_AT + RECORD * i
        words[at : at + RECORD] = _part_words(part)
    splits = max(group.splits for group in groups)
    grown = next((part.longest for part in parts if part.grows), 0)
    return Plan(tuple(words), device, form, programs[-1], partials[-1], splits, grown)


def _groups(
    parts: Sequence[Spans], shape: tuple[int, int, int], form: Form, cores: int, appends: bool
) -> list[_Group]:
    b, h, m = shape
    by_sequences: dict[int, list[Spans]] = {}
    for part in parts:
        # What pages are read depends on the query, so that each sequence has its own.
        own = b if part.pages is not None else part.sequences
        by_sequences.setdefault(own, []).append(part)
    if appends:
        by_sequences.setdefault(b, [])
    groups, first, tile = [], 0, _tile(m * b // min(by_sequences))
    for sequences, members in by_sequences.items():
        some = sorted(members, key=lambda part: part.grows)  # What grows is found as the last one.
        spans, rows = sequences * h, b // sequences * m
        tiles = -(-rows // tile)
        blocks = max(1, sum(-(-_most_rows(part) // form.block) for part in some))
        wanted = -(-spans * tiles * blocks // (_PROGRAMS_A_CORE * cores))
        each = max(1, wanted, -(-blocks // MOST_SPLITS))
        splits = -(-blocks // each)
        groups.append(_Group(some, first, sequences, spans, rows, tiles, each, splits))
        first += len(some)
    return groups


def _most_rows(part: Spans) -> int:
    """Count the rows of the longest span while the plan holds: one that grows has room for more."""
    return max(part.longest, part.stride) if part.grows else part.longest


def _tile(rows: int) -> int:
    return min(_LARGEST_TILE, max(16, 1 << (rows - 1).bit_length()))


def _form(parts: Sequence[Spans]) -> Form:
    types = {x.dtype for part in parts for x in (part.keys, part.values)}
    if len(types) != 1:
        raise UnplannedError(f"pairs of types {types}")
    (dtype,) = types
    biased = any(part.bias is not None for part in parts)
    paged = any(part.pages is not None for part in parts)
    forms = set()
    for keys, values in ((part.keys, part.values) for part in parts):
        if not isinstance(keys, Tensor) and not isinstance(values, Tensor):
            steps = keys.scale.dtype, values.scale.dtype
            forms.add((keys.bits, *steps, values.group or 0))
    if not forms:
        sizes = [x.shape[-1] for p in parts for x in (p.keys, p.values) if isinstance(x, Tensor)]
        # As many rows as a multiprocessor has room for while the next ones are on their way.
        rows = _BYTES_OF_A_BLOCK // (max(sizes) * dtype.itemsize)
        return Form(dtype, min(64, max(16, 1 << rows.bit_length() - 1)), biased=biased, paged=paged)
    if len(forms) > 1:
        raise UnplannedError("quantized parts of several forms")
    ((bits, key_steps, value_steps, group),) = forms
    # A block is a page, whose keys share their scales.
    return Form(dtype, 32, 16, bits, key_steps, value_steps, group, biased, paged)


def _group_words(group: _Group, program: int, partial: int, appends: bool) -> list[int]:
    words = [program, group.spans, group.tiles, group.splits, group.rows, group.sequences]
    words += [group.first, len(group.parts), partial, group.each, int(appends)]
    return words + [0] * (RECORD - len(words))


def _part_words(part: Spans) -> list[int]:
    keys, key_scale, key_zero = _addresses(part.keys)
    values, value_scale, value_zero = _addresses(part.values)
    words = [keys, values, _address(part.starts), _address(part.lengths), part.stride]
    words += [part.longest, int(part.grows), _address(part.positions), part.column]
    words += [_address(part.bias), _address(part.pages)]
    words += [0 if part.pages is None else part.pages.shape[1]]
    words += [key_scale, key_zero, value_scale, value_zero]
    return words


def _addresses(x: Tensor | Coded) -> tuple[int, int, int]:
    if isinstance(x, Tensor):
        return x.data_ptr(), 0, 0
    return x.codes.data_ptr(), x.scale.data_ptr(), x.zero.data_ptr()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
