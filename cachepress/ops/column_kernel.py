"""Sums and peaks of the attention to each row on a GPU, without writing weights: two launches.

The first finds the log-sum-exp of every query. With it a weight is known by itself, so that the
second goes through the queries for each row, and holds no more than the row's result. Logits are
in base 2 throughout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import e, log, log2
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachepress.ops.attention import AttentionRule

_PROGRAMS = 1024
"""Programs that fill any chip several times."""
_NOTHING = 1e30
"""Minus the highest logit of a query that sees no row, and its log-sum-exp: no weight is left."""
_LOG2_E, _LN_2 = log2(e), log(2)


@dataclass(frozen=True)
class Attention:
    """Attention of queries ``[B, H, G, Q, D]`` to keys ``[B, H, T, D]``, as the kernels read it.

    Attributes:
        queries: of the last Q rows.
        keys: of all rows.
        valid: ``[B, H, T]`` bool, which rows can be attended to; None where all can.
        rule: the layer's rule.
    """

    queries: Tensor
    keys: Tensor
    valid: Tensor | None
    rule: AttentionRule

    def sums(self, votes: Tensor, columns: slice) -> Tensor:
        """Sum the attention to each row over the queries, times their ``votes [B, Q]``.

        Returns:
            ``[B, H, G, T]`` in float32, of the rows that are asked for.
        """
        return self._reduced(votes, columns, peaks=False)

    def peaks(self, votes: Tensor, columns: slice) -> Tensor:
        """Find the most attention to each row from one query, times its vote, as ``sums`` does."""
        return self._reduced(votes, columns, peaks=True)

    def _reduced(self, votes: Tensor, columns: slice, peaks: bool) -> Tensor:
        b, h, g, q, _ = self.queries.shape
        t = self.keys.shape[2]
        first, stop, _ = columns.indices(t)
        out = votes.new_empty(b, h, g, max(0, stop - first), dtype=torch.float32)
        options = self._options(streams_queries=True)
        grid = (triton.cdiv(out.shape[-1], options["BLOCK_N"]), b * h * g)
        with torch.cuda.device_of(self.keys):
            lse = self._log_sums()
            given = (*self._given, votes.contiguous(), lse, out, q, t, first, stop)
            _launch(_reduce, grid)(*given, *self._factors, PEAKS=peaks, **options)
        return out

    def _log_sums(self) -> Tensor:
        """Compute the log-sum-exp of each query's logits, ``[B * H * G, Q]``."""
        b, h, g, q, _ = self.queries.shape
        t, heads = self.keys.shape[2], b * h * g
        options = self._options(streams_queries=False)
        blocks, block_n = triton.cdiv(q, options["BLOCK_M"]), options["BLOCK_N"]
        # Few queries fill a chip only where several programs share out the rows that one can see.
        splits = max(1, min(_PROGRAMS // max(1, blocks * heads), triton.cdiv(t, 8 * block_n)))
        span = triton.cdiv(triton.cdiv(t, splits), block_n) * block_n
        lse = torch.empty(splits, heads, q, dtype=torch.float32, device=self.keys.device)
        launch = _launch(_log_sum, (blocks, heads, splits))
        launch(*self._given, lse, q, t, span, *self._factors, **options)
        lse = lse[0] if splits == 1 else (lse * _LN_2).logsumexp(0) * _LOG2_E
        if self.rule.sinks is not None:
            sinks = self.rule.sinks.float().view(h, g, 1).expand(b, h, g, q)
            lse = torch.logaddexp2(lse, sinks.reshape(heads, q) * _LOG2_E)
        return lse.masked_fill(lse < -_NOTHING / 2, _NOTHING)

    @property
    def _given(self) -> tuple[Tensor | int, ...]:
        queries, keys = self.queries, self.keys
        if keys.dtype == torch.bfloat16 and not isinstance(_reduce, triton.JITFunction):
            # Triton's interpreter multiplies no bfloat16; in float32 the products are the same.
            queries, keys = queries.float(), keys.float()
        queries, keys = (x if x.stride(-1) == 1 else x.contiguous() for x in (queries, keys))
        # Where every row is valid, nothing is read there.
        valid = keys if self.valid is None else self.valid.contiguous().view(torch.uint8)
        return queries, *queries.stride()[:4], keys, *keys.stride()[:3], valid

    @property
    def _factors(self) -> tuple[float, float]:
        """What products are multiplied by, and after that their tanh if there is a soft cap."""
        scaling, cap = self.rule.scaling, self.rule.softcap
        return (scaling * _LOG2_E, 1.0) if cap is None else (scaling / cap, cap * _LOG2_E)

    def _options(self, streams_queries: bool) -> dict[str, int]:
        """Options of a kernel whose programs go through blocks of queries, or of rows."""
        _, h, g, _, d = self.queries.shape
        # What stays in a program, and what streams by: two programs fit into the memory of a core.
        stays, streams, warps = (128, 64, 8) if d <= 128 else (64, 32, 4)
        return {
            "H": h,
            "G": g,
            "D": d,
            "MASKED": self.valid is not None,
            "CAPPED": self.rule.softcap is not None,
            "BLOCK_M": streams if streams_queries else stays,
            "BLOCK_N": stays if streams_queries else streams,
            "BLOCK_D": max(16, triton.next_power_of_2(d)),
            "num_warps": warps,
            "num_stages": 3,
        }


def _launch(kernel: object, grid: tuple[int, ...]) -> Callable[..., None]:
    # A jitted function has the types of its kernel's arguments, not those of what it is given.
    return cast(Callable[..., None], kernel[grid])  # pyright: ignore[reportIndexIssue]


@triton.jit
def _logits(query, key, scale, cap, CAPPED: tl.constexpr):
    logits = tl.dot(query, key, input_precision="ieee") * scale
    if CAPPED:
        logits = cap * (2 * tl.sigmoid(2 * logits) - 1)
    return logits


@triton.jit
def _more(top, total, logits):
    """Add logits ``[M, N]`` to a running maximum and to the sum of exponentials relative to it."""
    higher = tl.maximum(top, tl.max(logits, 1))
    total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
    return higher, total


@triton.jit(do_not_specialize=["q", "t", "span"])
def _log_sum(
    q_ptr,
    q_b,
    q_h,
    q_g,
    q_q,
    k_ptr,
    k_b,
    k_h,
    k_t,
    valid_ptr,
    lse_ptr,
    q,
    t,
    span,
    scale,
    cap,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The last queries see the most rows: they begin first, so that they do not end last.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    x, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h, g = x // (H * G), x // G % H, x % G
    in_, id_ = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    im = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = tl.load(
        q_ptr + b * q_b + h * q_h + g * q_g + im.to(tl.int64)[:, None] * q_q + id_[None, :],
        mask=(im[:, None] < q) & (id_[None, :] < D),
        other=0.0,
    )
    first, sees = split * span, t - q + im
    stop = tl.minimum(tl.minimum(first + span, t), t - q + (block + 1) * BLOCK_M)
    # Up to here every query sees every row.
    clear = tl.minimum(first + span, (t - q + block * BLOCK_M + 1) // BLOCK_N * BLOCK_N)
    clear = tl.maximum(first, clear)
    keys = k_ptr + b * k_b + h * k_h + id_[:, None]
    valid = valid_ptr + (b * H + h) * t
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for row in range(first, clear, BLOCK_N):
        rows = row + in_
        here = keys + rows.to(tl.int64)[None, :] * k_t
        if MASKED:
            held = tl.load(valid + rows) != 0
            key = tl.load(here, mask=held[None, :] & (id_[:, None] < D), other=0.0)
            logits = _logits(query, key, scale, cap, CAPPED)
            logits = tl.where(held[None, :], logits, -1e30)
        else:
            key = tl.load(here, mask=id_[:, None] < D, other=0.0)
            logits = _logits(query, key, scale, cap, CAPPED)
        top, total = _more(top, total, logits)
    for row in range(clear, stop, BLOCK_N):
        rows = row + in_
        held = rows < stop
        if MASKED:
            held = held & (tl.load(valid + rows, mask=held, other=0) != 0)
        here = keys + rows.to(tl.int64)[None, :] * k_t
        key = tl.load(here, mask=held[None, :] & (id_[:, None] < D), other=0.0)
        logits = _logits(query, key, scale, cap, CAPPED)
        logits = tl.where(held[None, :] & (rows[None, :] <= sees[:, None]), logits, -1e30)
        top, total = _more(top, total, logits)
    lse = tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-37)), -1e30)
    tl.store(lse_ptr + (split * tl.num_programs(1) + x) * q + im, lse, mask=im < q)


@triton.jit
def _weights(
    q_ptr,
    q_q,
    votes_ptr,
    lse_ptr,
    key,
    im,
    q,
    scale,
    cap,
    D: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the weighted attention of the queries ``im [M]`` to ``key [D, N]``, ``[M, N]``."""
    id_ = tl.arange(0, BLOCK_D)
    query = tl.load(
        q_ptr + im.to(tl.int64)[:, None] * q_q + id_[None, :],
        mask=(im[:, None] < q) & (id_[None, :] < D),
        other=0.0,
    )
    vote = tl.load(votes_ptr + im, mask=im < q, other=0.0)
    lse = tl.load(lse_ptr + im, mask=im < q, other=0.0)
    return tl.exp2(_logits(query, key, scale, cap, CAPPED) - lse[:, None]) * vote[:, None]


@triton.jit
def _joined(one, other, PEAKS: tl.constexpr):
    if PEAKS:
        return tl.maximum(one, other)
    else:
        return one + other


@triton.jit(do_not_specialize=["q", "t", "first", "stop"])
def _reduce(
    q_ptr,
    q_b,
    q_h,
    q_g,
    q_q,
    k_ptr,
    k_b,
    k_h,
    k_t,
    valid_ptr,
    votes_ptr,
    lse_ptr,
    out_ptr,
    q,
    t,
    first,
    stop,
    scale,
    cap,
    PEAKS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    x = tl.program_id(1).to(tl.int64)
    b, h, g = x // (H * G), x // G % H, x % G
    im, id_ = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    start = first + tl.program_id(0) * BLOCK_N
    rows = start + tl.arange(0, BLOCK_N)
    held = rows < stop
    if MASKED:
        held = held & (tl.load(valid_ptr + (b * H + h) * t + rows, mask=held, other=0) != 0)
    key = tl.load(
        k_ptr + b * k_b + h * k_h + rows.to(tl.int64)[None, :] * k_t + id_[:, None],
        mask=held[None, :] & (id_[:, None] < D),
        other=0.0,
    )
    q_ptr += b * q_b + h * q_h + g * q_g
    votes_ptr += b * q
    lse_ptr += x * q
    # No query before the first sees any of the rows, and from the clear one on all are seen.
    begin = tl.maximum(start - (t - q), 0) // BLOCK_M * BLOCK_M
    clear = tl.maximum(start + BLOCK_N - 1 - (t - q), 0)
    clear = tl.minimum((clear + BLOCK_M - 1) // BLOCK_M * BLOCK_M, q)
    found = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(begin, clear, BLOCK_M):
        weights = _weights(
            q_ptr, q_q, votes_ptr, lse_ptr, key, at + im, q, scale, cap, D, CAPPED, BLOCK_D
        )
        seen = rows[None, :] <= t - q + at + im[:, None]
        found = _joined(found, tl.where(seen, weights, 0.0), PEAKS)
    for at in range(tl.maximum(begin, clear), q, BLOCK_M):
        weights = _weights(
            q_ptr, q_q, votes_ptr, lse_ptr, key, at + im, q, scale, cap, D, CAPPED, BLOCK_D
        )
        found = _joined(found, weights, PEAKS)
    out = tl.max(found, 0) if PEAKS else tl.sum(found, 0)
    out = tl.where(held, out, 0.0)
    tl.store(out_ptr + x * (stop - first) + rows - first, out, mask=rows < stop)
