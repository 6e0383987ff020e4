"""Attention for decoding on a GPU: one launch over all pairs of a layer, and one that merges.

Every program reads some blocks of rows of one span for all queries of that span, so that keys and
values are read once, and long spans keep as many programs busy as short ones. Where the rows are is
read from a table on the device, see ``cachepress.ops.paged_attention.plan``.
"""

import os
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachepress.ops.attention import AttentionRule
from cachepress.ops.paged_attention.plan import Plan, RecordedPlan
from cachepress.ops.paged_attention.triton_kernels import attend, merge

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class NewToken(NamedTuple):
    """A decoded token that the kernel appends to the part that grows.

    Attributes:
        keys: ``[B, H, 1, D]``.
        values: ``[B, H, 1, E]``.
    """

    keys: Tensor
    values: Tensor


class Partials(NamedTuple):
    """Attention over some of the rows each, by whose log-sum-exp it is merged with the others.

    Attributes:
        out: ``[partials, E]`` weighted means of values, float32.
        lse: ``[partials]`` log of the summed exponentials of the logits; very low for no rows.
    """

    out: Tensor
    lse: Tensor


def triton_attention(
    query: Tensor,
    plan: Plan | RecordedPlan,
    rule: AttentionRule,
    heads: int,
    value_dim: int,
    added: Tensor,
    *,
    bias: Tensor | None = None,
    new: NewToken | None = None,
) -> Tensor:
    """Compute attention of the queries over all parts of a plan, ``[B, n, H * G, E]``.

    Args:
        query: ``[B, H * G, n, D]``.
        plan: where the rows are.
        rule: the layer's rule.
        heads: KV heads H.
        value_dim: numbers of a value, E.
        added: ``[1]`` int32, the tokens that the growing part got since the plan was made.
        bias: ``[B or 1, n, S]`` float32 over text columns, added to the logits; None where each
            query sees all tokens up to itself.
        new: a token that is appended, and attended to.
    """
    with torch.cuda.device_of(query):  # Triton launches on the current device.
        partials = _attended(query, plan, rule, heads, value_dim, added, bias, new)
        return _merged(partials, query, plan, rule, heads, value_dim)


def _attended(
    query: Tensor,
    plan: Plan | RecordedPlan,
    rule: AttentionRule,
    heads: int,
    value_dim: int,
    added: Tensor,
    bias: Tensor | None,
    new: NewToken | None,
) -> Partials:
    """Attend over some of the rows in each program."""
    _, hq, n, d = query.shape
    m, form = hq // heads * n, plan.form
    query = query.contiguous()
    partials = Partials(
        query.new_empty(plan.partials, value_dim, dtype=torch.float32),
        query.new_empty(plan.partials, dtype=torch.float32),
    )
    rounds = torch.promote_types(query.dtype, form.dtype)
    # Triton's interpreter multiplies no bfloat16; in float32 the products are the same.
    work = torch.float32 if rounds == torch.bfloat16 and _INTERPRETED else rounds
    # A jitted function has the types of its kernel's arguments, not those of what it is given.
    launch = cast(Callable[..., None], attend[(plan.programs,)])
    launch(
        query,
        query if new is None else new.keys.contiguous(),
        query if new is None else new.values.contiguous(),
        plan.table,
        added,
        query if bias is None else bias.contiguous(),
        *partials,
        heads,
        m,
        n,
        *((1, 1) if bias is None else (bias.shape[0], bias.shape[2])),
        rule.scaling,
        rule.softcap or 1.0,
        D=d,
        E=value_dim,
        BLOCK_D=_power(d),
        BLOCK_E=_power(value_dim),
        BLOCK_M=form.tile,
        BLOCK_N=form.block,
        STORED=_TYPES[form.dtype],
        ROUNDS=_TYPES[rounds],
        WORK=_TYPES[work],
        BITS=form.bits,
        KEY_STEPS=_TYPES[form.key_steps],
        VALUE_STEPS=_TYPES[form.value_steps],
        VALUE_GROUP=form.value_group,
        CAPPED=rule.softcap is not None,
        MASKED=bias is not None,
        BIASED=form.biased,
        PAGED=form.paged,
        WINDOW=form.window,
        APPENDS=new is not None,
        CAUSAL=n > 1 and bias is None,
        PRECISION="ieee" if work == torch.float32 else "tf32",
    )
    return partials


def _merged(
    partials: Partials,
    query: Tensor,
    plan: Plan | RecordedPlan,
    rule: AttentionRule,
    heads: int,
    value_dim: int,
) -> Tensor:
    b, hq, n, _ = query.shape
    out = query.new_empty(b, n, hq, value_dim)
    launch = cast(Callable[..., None], merge[(b * hq * n,)])
    launch(
        *partials,
        plan.table,
        out if rule.sinks is None else rule.sinks.float(),
        out,
        heads,
        hq // heads * n,
        n,
        E=value_dim,
        BLOCK_E=_power(value_dim),
        SPLITS=triton.next_power_of_2(plan.splits),
        SINKS=rule.sinks is not None,
    )
    return out


def _power(size: int) -> int:
    """Round up to what the kernel can multiply."""
    return max(16, triton.next_power_of_2(size))
