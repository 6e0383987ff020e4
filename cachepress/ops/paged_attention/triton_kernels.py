"""The kernels themselves, in Triton's language: attention over a table's rows, and the merge.

How they are launched is in ``cachepress.ops.paged_attention.triton``; what a table holds in
``cachepress.ops.paged_attention.plan``.
"""

# Triton's compiler, and not Python's rules, says what the types in a kernel are.
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from cachepress.ops.paged_attention.layout import PAGE
from cachepress.ops.paged_attention.plan import GROUPS_AT, PARTS_AT, RECORD

_PAGE: tl.constexpr = tl.constexpr(PAGE)
_GROUPS: tl.constexpr = tl.constexpr(GROUPS_AT)
_PARTS: tl.constexpr = tl.constexpr(PARTS_AT)
_RECORD: tl.constexpr = tl.constexpr(RECORD)
_LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""Stands for the logarithm of 0: differences of it are numbers."""


@triton.jit
def attend(
    query_ptr,
    new_key_ptr,
    new_value_ptr,
    table,
    added_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    heads,
    m,
    n,
    masks,
    columns,
    scaling,
    softcap,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STORED: tl.constexpr,
    ROUNDS: tl.constexpr,
    WORK: tl.constexpr,
    BITS: tl.constexpr,
    KEY_STEPS: tl.constexpr,
    VALUE_STEPS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
    PAGED: tl.constexpr,
    WINDOW: tl.constexpr,
    APPENDS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend with one tile of a span's queries over some blocks of its rows.

    Programs of all groups of parts are numbered one after the other. A recorded launch may have
    more programs than the table needs; these have nothing to do.
    """
    pid = tl.program_id(0).to(tl.int64)
    chosen = 0
    for i in range(1, tl.load(table).to(tl.int32)):
        chosen = tl.where(pid >= tl.load(table + _GROUPS + i * _RECORD), i, chosen)
    group = table + _GROUPS + chosen * _RECORD
    local = pid - tl.load(group)
    tiles, splits = tl.load(group + 2), tl.load(group + 3)
    split, tile, span = local % splits, (local // splits) % tiles, local // (splits * tiles)
    if span < tl.load(group + 1):
        rows, sequences = tl.load(group + 4), tl.load(group + 5)
        # The queries of all sequences that read this span, one sequence after the other.
        im, id_, ie = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
        row = tile * BLOCK_M + im
        asked = row < rows
        sequence = (row // m) * sequences + span // heads
        place = (sequence * heads + span % heads) * m + row % m
        query = tl.load(
            query_ptr + place[:, None] * D + id_[None, :],
            mask=asked[:, None] & (id_[None, :] < D),
            other=0.0,
        ).to(WORK)
        top = tl.full([BLOCK_M], _LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        sums = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        each = tl.load(group + 9)
        first, before = split * each, tl.zeros([], tl.int64)
        part = table + _PARTS + tl.load(group + 6) * _RECORD
        for _ in range(0, tl.load(group + 7).to(tl.int32)):
            start, length = _extent(part, span, added_ptr)
            blocks = tl.cdiv(length, BLOCK_N)
            low, high = tl.maximum(first - before, 0), tl.minimum(first + each - before, blocks)
            for block in range(low, high):
                slot, real = _slots(part, span, start, length, block, BLOCK_N, PAGED)
                keys, values = _pairs(
                    part, slot, real, D, E, BLOCK_D, BLOCK_E, STORED, BITS, KEY_STEPS, VALUE_STEPS,
                    VALUE_GROUP,
                )  # fmt: skip
                logits = tl.dot(query, keys.to(WORK), input_precision=PRECISION) * scaling
                if CAPPED:
                    logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
                seen = asked[:, None] & real[None, :]
                index = block * BLOCK_N + tl.arange(0, BLOCK_N)
                if CAUSAL:
                    newest = length - n + row % m % n
                    seen &= (index[None, :] <= newest[:, None]) | (tl.load(part + 6) == 0)
                if WINDOW:
                    seen &= index[None, :] > length - WINDOW
                if BIASED:
                    logits += _bias(part, slot, real)[None, :]
                if MASKED:
                    column = _columns(part, slot, index, real)
                    at = (sequence % masks * n + row % m % n)[:, None] * columns + column[None, :]
                    shift = tl.load(mask_ptr + at, mask=seen & (column[None, :] < columns), other=0)
                    seen &= shift > _LOWEST
                    logits += shift
                top, total, sums = _absorb(
                    top, total, sums, logits, seen, values, ROUNDS, WORK, PRECISION
                )
            before += blocks
            part += _RECORD
        # The group of sequences with rows of their own: its first program has the new token.
        if APPENDS and (tl.load(group + 10) != 0) & (split == 0):
            key = tl.load(new_key_ptr + span * D + id_, mask=id_ < D, other=0.0)
            value = tl.load(new_value_ptr + span * E + ie, mask=ie < E, other=0.0)
            if tile == 0:
                _append(part - _RECORD, span, added_ptr, key, value, D, E, STORED)
            logit = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scaling
            if CAPPED:
                logit = softcap * (2 * tl.sigmoid(2 * logit / softcap) - 1)
            higher = tl.maximum(top, logit)
            weight, fade = tl.exp(logit - higher), tl.exp(top - higher)
            sums = sums * fade[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
            total = total * fade + weight
            top = higher
        at = tl.load(group + 8) + (span * splits + split) * rows + row
        lse = tl.where(total > 0, top + tl.log(tl.maximum(total, 1e-37)), _LOWEST)
        tl.store(lse_ptr + at, lse, mask=asked)
        tl.store(
            out_ptr + at[:, None] * E + ie[None, :],
            sums / tl.maximum(total, 1e-37)[:, None],
            mask=asked[:, None] & (ie[None, :] < E),
        )


@triton.jit
def _absorb(
    top,
    total,
    sums,
    logits,
    seen,
    values,
    ROUNDS: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a block's rows to a softmax that goes on: its highest logit, its total and its sums."""
    logits = tl.where(seen, logits, _LOWEST)
    higher = tl.maximum(top, tl.max(logits, 1))
    weights = tl.where(seen, tl.exp(logits - higher[:, None]), 0.0)
    fade = tl.exp(top - higher)
    shares = tl.dot(weights.to(ROUNDS).to(WORK), values.to(WORK), input_precision=PRECISION)
    return higher, total * fade + tl.sum(weights, 1), sums * fade[:, None] + shares


@triton.jit
def _append(
    part, span, added_ptr, key, value, D: tl.constexpr, E: tl.constexpr, KIND: tl.constexpr
):
    """Write a token behind the rows of a span in the part that grows."""
    start, length = _extent(part, span, added_ptr)
    id_, ie = tl.arange(0, key.shape[0]), tl.arange(0, value.shape[0])
    keys = tl.load(part).to(tl.pointer_type(KIND)) + (start + length) * D
    values = tl.load(part + 1).to(tl.pointer_type(KIND)) + (start + length) * E
    tl.store(keys + id_, key.to(KIND), mask=id_ < D)
    tl.store(values + ie, value.to(KIND), mask=ie < E)


@triton.jit
def _extent(part, span, added_ptr):
    """Find the first row of a span in a part's memory, and how many there are."""
    starts, lengths = tl.load(part + 2), tl.load(part + 3)
    start, length = span * tl.load(part + 4), tl.load(part + 5)
    if starts != 0:
        start = tl.load(starts.to(tl.pointer_type(tl.int32)) + span).to(tl.int64)
    if lengths != 0:
        length = tl.load(lengths.to(tl.pointer_type(tl.int32)) + span).to(tl.int64)
    if tl.load(part + 6) != 0:
        length += tl.load(added_ptr).to(tl.int64)
    return start, length


@triton.jit
def _slots(part, span, start, length, block, BLOCK_N: tl.constexpr, PAGED: tl.constexpr):
    """Find where in a part's memory the rows of a block are, and which of them there are."""
    index = block * BLOCK_N + tl.arange(0, BLOCK_N)
    real = index < length
    slot = start + index
    if PAGED:
        pages = tl.load(part + 10)
        if pages != 0:
            listed = pages.to(tl.pointer_type(tl.int32)) + span * tl.load(part + 11)
            page = tl.load(listed + index // _PAGE, mask=real, other=0).to(tl.int64)
            slot = page * _PAGE + index % _PAGE
    return slot, real


@triton.jit
def _pairs(
    part,
    slot,
    real,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STORED: tl.constexpr,
    BITS: tl.constexpr,
    KEY_STEPS: tl.constexpr,
    VALUE_STEPS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
):
    """Load keys ``[D, N]`` and values ``[N, E]`` of some slots, dequantised if they are coded."""
    id_, ie = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_E)[None, :]
    some_keys, some_values = real[None, :] & (id_ < D), real[:, None] & (ie < E)
    keys_at, values_at = tl.load(part), tl.load(part + 1)
    if BITS == 0:
        keys = _loaded(keys_at, slot[None, :] * D + id_, some_keys, STORED)
        values = _loaded(values_at, slot[:, None] * E + ie, some_values, STORED)
    else:
        scale = tl.load(part + 12)
        if scale == 0:
            keys = _loaded(keys_at, slot[None, :] * D + id_, some_keys, STORED)
            values = _loaded(values_at, slot[:, None] * E + ie, some_values, STORED)
        else:
            # A block is one page, whose keys share a scale for each channel.
            page, channel = tl.min(tl.where(real, slot // _PAGE, 1 << 40), 0), tl.trans(id_)
            step = _loaded(scale, page * D + channel, channel < D, KEY_STEPS).to(tl.float32)
            zero = _loaded(tl.load(part + 13), page * D + channel, channel < D, KEY_STEPS)
            codes = _codes(keys_at, slot, real, D, BLOCK_D, BITS)
            keys = tl.trans((zero.to(tl.float32) + codes * step).to(STORED))
            if VALUE_GROUP == 0:
                at, some = slot[:, None], real[:, None]
            else:
                at = slot[:, None] * tl.cdiv(E, VALUE_GROUP) + ie // VALUE_GROUP
                some = some_values
            step = _loaded(tl.load(part + 14), at, some, VALUE_STEPS).to(tl.float32)
            zero = _loaded(tl.load(part + 15), at, some, VALUE_STEPS)
            codes = _codes(values_at, slot, real, E, BLOCK_E, BITS)
            values = (zero.to(tl.float32) + codes * step).to(STORED)
    return keys, values


@triton.jit
def _loaded(address, at, some, KIND: tl.constexpr):
    """Load numbers of a type from an address; memory of tensors begins at a multiple of 16."""
    pointer = tl.multiple_of(address.to(tl.pointer_type(KIND)), 16)
    return tl.load(pointer + at, mask=some, other=0.0)


@triton.jit
def _codes(address, slot, real, SIZE: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Load the numbers ``[N, BLOCK]`` of some slots, each of a few bits; bytes are read once."""
    each: tl.constexpr = 8 // BITS
    byte = tl.arange(0, BLOCK // each)[None, :]
    pointer = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
    some = real[:, None] & (byte < SIZE // each)
    codes = tl.load(pointer + slot[:, None] * (SIZE // each) + byte, mask=some, other=0)
    if BITS == 4:
        codes = tl.join(codes & 15, codes >> 4).reshape(slot.shape[0], BLOCK)
    if BITS == 2:
        even = tl.join(codes & 3, (codes >> 4) & 3)
        odd = tl.join((codes >> 2) & 3, codes >> 6)
        codes = tl.join(even, odd).reshape(slot.shape[0], BLOCK)
    return codes.to(tl.float32)


@triton.jit
def _bias(part, slot, real):
    """Load the bias of some slots; 0 where the part has none."""
    bias = tl.zeros(slot.shape, tl.float32)
    address = tl.load(part + 9)
    if address != 0:
        bias = tl.load(address.to(tl.pointer_type(tl.float32)) + slot, mask=real, other=0.0)
    return bias


@triton.jit
def _columns(part, slot, index, real):
    """Find the text columns of some slots."""
    column = tl.load(part + 8) + index
    positions = tl.load(part + 7)
    if positions != 0:
        pointer = positions.to(tl.pointer_type(tl.int32))
        column = tl.load(pointer + slot, mask=real, other=0).to(tl.int64)
    return column


@triton.jit
def merge(
    out_ptr,
    lse_ptr,
    table,
    sink_ptr,
    result_ptr,
    heads,
    m,
    n,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLITS: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Merge the partial results of one query, and write it where the model wants it."""
    row = tl.program_id(0).to(tl.int64)
    b, h, k = row // (heads * m), row // m % heads, row % m
    ie, split = tl.arange(0, BLOCK_E), tl.arange(0, SPLITS)
    g, q = k // n, k % n
    top = tl.full([], _LOWEST, tl.float32)
    if SINKS:
        top = tl.load(sink_ptr + h * (m // n) + g)
    total, sums = tl.zeros([], tl.float32), tl.zeros([BLOCK_E], tl.float32)
    if SINKS:
        total += 1.0
    for i in range(0, tl.load(table).to(tl.int32)):
        group = table + _GROUPS + i * _RECORD
        splits, rows, sequences = tl.load(group + 3), tl.load(group + 4), tl.load(group + 5)
        span = b % sequences * heads + h
        at = tl.load(group + 8) + (span * splits + split) * rows + b // sequences * m + k
        lse = tl.load(lse_ptr + at, mask=split < splits, other=_LOWEST)
        out = tl.load(
            out_ptr + at[:, None] * E + ie[None, :],
            mask=(split < splits)[:, None] & (ie < E)[None, :],
            other=0.0,
        )
        higher = tl.maximum(top, tl.max(lse, 0))
        weight = tl.where(lse > _LOWEST, tl.exp(lse - higher), 0.0)
        fade = tl.exp(top - higher)
        sums = sums * fade + tl.sum(out * weight[:, None], 0)
        total = total * fade + tl.sum(weight, 0)
        top = higher
    place = ((b * n + q) * heads * (m // n) + h * (m // n) + g) * E + ie
    kind = result_ptr.dtype.element_ty
    tl.store(result_ptr + place, (sums / tl.maximum(total, 1e-37)).to(kind), mask=ie < E)
