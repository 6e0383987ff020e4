"""Attention for decoding on a GPU: a split-K kernel over spans of any length.

Every program reads some rows of one span for all queries of that span, so keys and values are read
once, and long spans keep as many programs busy as short ones.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachepress.ops.attention import AttentionRule
from cachepress.ops.paged_attention.parts import Part, Spans, apart, together

_ROWS_OF_A_SPLIT = 1024


class Partial(NamedTuple):
    """Attention over some of the rows with its log-sum-exp, by which it is merged with others.

    Attributes:
        out: ``[X, M, E]`` weighted mean of the values, float32.
        lse: ``[X, M]`` log of the summed exponentials of the logits; very low for no rows.
    """

    out: Tensor
    lse: Tensor


def triton_attention(query: Tensor, parts: Sequence[Part], rule: AttentionRule) -> Tensor:
    """Compute attention of the queries over all parts, all of which are visible to them.

    Args:
        query: ``[B, H, G, n, D]``.
        parts: the rows, without bias.
        rule: the layer's rule.

    Returns:
        ``[B, H, G, n, E]`` in float32.
    """
    b, h, g, n, d = query.shape
    flat = query.reshape(b * h, g * n, d)
    partials = [_attend(flat, part.spans(), rule) for part in parts]
    if rule.sinks is not None:
        sinks = rule.sinks.float().view(1, h, g, 1).expand(b, h, g, n).reshape(b * h, g * n)
        partials.append(Partial(torch.zeros_like(partials[0].out), sinks))
    return merge(partials).out.view(b, h, g, n, -1)


def merge(partials: Sequence[Partial]) -> Partial:
    """Merge attention over some rows each into attention over all of them."""
    lse = torch.stack([partial.lse for partial in partials])
    total = lse.logsumexp(0)
    weights = (lse - total).exp().unsqueeze(-1)
    out = sum(partial.out * weight for partial, weight in zip(partials, weights, strict=True))
    return Partial(out, total)  # type: ignore


def _attend(query: Tensor, rows: Spans, rule: AttentionRule) -> Partial:
    spans, sequences = len(rows.starts), query.shape[0]
    shared = together(query, spans).contiguous()
    m, d, e = shared.shape[1], shared.shape[2], rows.values.shape[-1]
    splits = max(1, triton.cdiv(rows.longest, _ROWS_OF_A_SPLIT))
    out = shared.new_empty(spans, splits, m, e, dtype=torch.float32)
    lse = shared.new_empty(spans, splits, m, dtype=torch.float32)
    # A jitted function has the types of its kernel's arguments, not those of what it is given.
    launch = cast(Callable[..., None], _decode[(spans, splits)])
    launch(
        shared,
        rows.keys,
        rows.values,
        rows.starts,
        rows.lengths,
        out,
        lse,
        m,
        d,
        e,
        rule.scaling,
        rule.softcap or 1.0,
        ROWS=_ROWS_OF_A_SPLIT,
        CAPPED=rule.softcap is not None,
        BLOCK_M=max(16, triton.next_power_of_2(m)),
        BLOCK_N=64,
        BLOCK_D=max(16, triton.next_power_of_2(d)),
        BLOCK_E=max(16, triton.next_power_of_2(e)),
    )
    joined = merge([Partial(out[:, i], lse[:, i]) for i in range(splits)])
    return Partial(apart(joined.out, sequences), apart(joined.lse, sequences))


@triton.jit
def _decode(
    query_ptr,
    key_ptr,
    value_ptr,
    start_ptr,
    length_ptr,
    out_ptr,
    lse_ptr,
    m,
    d,
    e,
    scaling,
    softcap,
    ROWS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    span, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    start = tl.load(start_ptr + span)
    length = tl.load(length_ptr + span)
    first = split * ROWS
    stop = tl.minimum(first + ROWS, length)
    im, in_ = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    id_, ie = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    query = tl.load(
        query_ptr + (span * m + im[:, None]) * d + id_[None, :],
        mask=(im[:, None] < m) & (id_[None, :] < d),
        other=0.0,
    )
    query = query.to(tl.float32) * scaling
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for row in range(first, stop, BLOCK_N):
        rows = row + in_
        real = rows < stop
        keys = tl.load(
            key_ptr + (start + rows[None, :]) * d + id_[:, None],
            mask=real[None, :] & (id_[:, None] < d),
            other=0.0,
        )
        logits = tl.dot(query, keys.to(tl.float32), input_precision="ieee")
        if CAPPED:
            logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
        logits = tl.where(real[None, :], logits, -1e30)
        higher = tl.maximum(top, tl.max(logits, 1))
        weights = tl.where(real[None, :], tl.exp(logits - higher[:, None]), 0.0)
        fade = tl.exp(top - higher)
        values = tl.load(
            value_ptr + (start + rows[:, None]) * e + ie[None, :],
            mask=real[:, None] & (ie[None, :] < e),
            other=0.0,
        )
        sums = sums * fade[:, None] + tl.dot(weights, values.to(tl.float32), input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        top = higher
    place = (span * splits + split) * m + im
    lse = tl.where(total > 0, top + tl.log(tl.maximum(total, 1e-37)), -1e30)
    tl.store(lse_ptr + place, lse, mask=im < m)
    tl.store(
        out_ptr + place[:, None] * e + ie[None, :],
        sums / tl.maximum(total, 1e-37)[:, None],
        mask=(im[:, None] < m) & (ie[None, :] < e),
    )
