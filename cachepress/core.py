"""The seams of the library: what a press sees, what it answers, and how a layer is settled.

Shape letters, used at the end of lines where shapes change:
    B batch, H KV heads, G query heads per KV head, T rows (held plus new), N held rows,
    Q queries, D key head size, E value head size, S text columns (seen plus new).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from cachepress.ops import AttentionRule, attention_column_sums


@dataclass(frozen=True)
class Needs:
    """What a press wants to see beyond keys, values and positions; paid for only when declared.

    Attributes:
        queries: how many of the last queries of the forward, 0 for none.
        moments_after: mean and covariance of the queries before RoPE, over all queries but the
            first ``moments_after`` of the text; None for none.
        attention_sums: attention that each row received, summed over the queries of the forward.
    """

    queries: int = 0
    moments_after: int | None = None
    attention_sums: bool = False

    @property
    def rotary(self) -> bool:
        """Whether the layer's rotary embedding must be found and verified."""
        return self.moments_after is not None


class Rotary(Protocol):
    """The position embedding of one layer, verified against a key that the layer computed."""

    def __call__(self, x: Tensor, positions: Tensor, *, inverse: bool = False) -> Tensor:
        """Rotate ``x [B, ..., n, D]`` to ``positions [B, n]``, or back from them."""
        ...

    def mean(self, x: Tensor, positions: Tensor) -> Tensor:
        """Average of ``x [B, ..., D]`` rotated to each of ``positions [B, n]``."""
        ...


@dataclass(frozen=True)
class Moments:
    """Mean ``[B, H, G, D]`` and covariance ``[B, H, G, D, D]`` of queries before RoPE."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, x: Tensor, counted: Tensor) -> "Moments":
        """Moments of ``x [B, H, G, Q, D]`` over the queries with ``counted [B, Q]``."""
        weight = counted[:, None, None, :, None].to(x.dtype)
        count = weight.sum(-2).clamp(min=1)  # [B, 1, 1, 1]
        mean = (x * weight).sum(-2) / count  # [B, H, G, D]
        centred = (x - mean.unsqueeze(-2)) * weight
        return cls(mean, centred.mT @ centred / count.unsqueeze(-1))


@dataclass(frozen=True)
class LayerView:
    """One layer's table of rows, as a scorer sees it: rows are tokens in text order.

    Rows that are not valid (padding, empty slots) stand before all others, so the last ``Q`` rows
    are those of the last ``Q`` queries in every sequence, padded or not.

    Attributes:
        keys: ``[B, H, T, D]``, as the model's attention used them (normed and rotated).
        values: ``[B, H, T, E]``.
        positions: ``[B, H, T]`` index of the row in the text, padding included; -1 if empty.
        index: ``[B, H, T]`` index of the row in its own text, without padding.
        valid: ``[B, H, T]`` bool; False for padding and empty slots.
        n_seen: ``[B]`` valid rows of the text so far.
        n_kept: ``[B]`` rows that the budget leaves to each head.
        next_position: ``[B]`` the position that the next query will be rotated to.
        layer: index of the layer in the model.
        n_layers: number of layers of the model.
        rule: how the layer turns query-key products into weights.
        queries: ``[B, H, G, Q, D]`` the last Q queries as attention used them, or None.
        moments: moments of the queries before RoPE, or None.
        rotary: the layer's position embedding, or None.
        attention_sums: ``[B, H, G, T]`` attention received from all queries, or None.
        attention_counts: ``[B, H, T]`` how many queries could attend to the row, or None.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    index: Tensor
    valid: Tensor
    n_seen: Tensor
    n_kept: Tensor
    next_position: Tensor
    layer: int
    n_layers: int
    rule: AttentionRule
    queries: Tensor | None = None
    moments: Moments | None = None
    rotary: Rotary | None = None
    attention_sums: Tensor | None = None
    attention_counts: Tensor | None = None

    def __getitem__(self, rows: slice) -> "LayerView":
        """The same view over some of its rows; every row column is sliced."""
        columns = {}
        for name in ("keys", "values"):
            columns[name] = getattr(self, name)[:, :, rows]
        for name in ("positions", "index", "valid", "attention_sums", "attention_counts"):
            column = getattr(self, name)
            columns[name] = None if column is None else column[..., rows]
        return replace(self, **columns)

    def last_queries(self, n: int) -> Tensor:
        """The last ``n`` queries (fewer if the forward was shorter), ``[B, H, G, Q, D]``."""
        if self.queries is None:
            raise TypeError("the press did not declare queries in its needs")
        return self.queries[..., -n:, :]

    def window_attention(self, n: int) -> Tensor:
        """Attention that each row receives from the last ``n`` queries, ``[B, H, G, T]``.

        The mean over the queries that are tokens: fewer than ``n`` in a shorter text.
        """
        queries = self.last_queries(n)
        sums = attention_column_sums(queries, self.keys, self.valid, self.rule)
        voters = self.valid[:, 0, -queries.shape[-2] :].sum(-1).clamp(min=1)
        return sums / voters[:, None, None, None]


class Budget(Protocol):
    """How many rows stay, and who competes for them."""

    def count(self, n_seen: Tensor) -> Tensor:
        """Rows that each head keeps, ``[B]``, of ``n_seen [B]`` valid rows of text."""
        ...

    def select(self, scores: Tensor, view: LayerView) -> Tensor:
        """Keep mask ``[B, H, T]`` from ``scores [B, H, T]``, higher is kept."""
        ...


class Schedule(Protocol):
    """When a layer is settled."""

    def due(self, n_seen: int, n_new: int) -> bool:
        """Whether a forward of ``n_new`` tokens on ``n_seen`` earlier ones settles the layer."""
        ...


class Press(Protocol):
    """What the engine asks of a press."""

    @property
    def needs(self) -> Needs:
        """What the scorer wants to see beyond keys, values and positions."""
        ...

    @property
    def budget(self) -> Budget:
        """How many rows stay, and who competes for them."""
        ...

    @property
    def schedule(self) -> Schedule:
        """When a layer is settled."""
        ...

    def score(self, view: LayerView) -> Tensor:
        """Worth of each row, ``[B, H, T]``; the highest are kept."""
        ...


@dataclass(frozen=True)
class Rows:
    """Rows of one layer at one moment: what attention reads and a press scores.

    Attributes:
        keys: ``[B, H, T, D]``.
        values: ``[B, H, T, E]``.
        positions: ``[B, H, T]`` index in the text, -1 in an empty slot; None when row t of every
            head is text column t.
        full: whether no slot is empty.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    full: bool = True

    def text_positions(self) -> Tensor:
        """Positions ``[B, H, T]``, written out."""
        if self.positions is not None:
            return self.positions
        b, h, t, _ = self.keys.shape
        return torch.arange(t, dtype=torch.int32, device=self.keys.device).expand(b, h, t)


class Store(Protocol):
    """What the engine asks of a cache layer: hold rows, and drop those that lost."""

    def keep(self, rows: Rows, mask: Tensor) -> None:
        """Hold exactly the rows of ``mask [B, H, T]``, in their order."""
        ...


@dataclass(frozen=True)
class Forward:
    """What one layer's attention call showed.

    Attributes:
        query: ``[B, H * G, n, D]`` as attention used it.
        rows: all rows, those of this forward last.
        text_valid: ``[B, S]`` bool, which text columns are tokens; None when all are.
        rope: ``[B, n]`` positions that this forward's tokens are rotated to.
        layer: index of the layer.
        n_layers: number of layers of the model.
        rule: how the layer turns products into weights.
        find_rotary: finds and verifies the layer's position embedding, or raises.
    """

    query: Tensor
    rows: Rows
    text_valid: Tensor | None
    rope: Tensor
    layer: int
    n_layers: int
    rule: AttentionRule
    find_rotary: Callable[[], Rotary]


def settle(press: Press, store: Store, forward: Forward) -> None:
    """Score the rows of a layer and drop the losers from its store.

    Nothing is scored when the budget holds every row, so ratio 0 costs nothing.
    """
    view = _table(forward)
    view = replace(view, n_kept=press.budget.count(view.n_seen))
    if bool((view.n_kept[:, None] >= view.valid.sum(-1)).all()):
        return
    view = observe(press.needs, view, forward)
    mask = press.budget.select(press.score(view), view)
    store.keep(Rows(view.keys, view.values, view.positions), mask)


def observe(needs: Needs, view: LayerView, forward: Forward) -> LayerView:
    """Add to a table of rows the extras that a press declared."""
    b, h = view.keys.shape[:2]
    n = forward.query.shape[2]
    query = forward.query.detach()
    if forward.text_valid is not None:
        query = _gather(query, _last(forward.text_valid[:, None, -n:]))
    query = query.reshape(b, h, -1, n, query.shape[-1])  # [B, H, G, Q, D]
    if needs.queries:
        view = replace(view, queries=query[..., -needs.queries :, :])
    if needs.attention_sums:
        sums = attention_column_sums(query, view.keys, view.valid, view.rule)
        view = replace(view, attention_sums=sums, attention_counts=_times_seen(view, n))
    if needs.moments_after is not None:
        rotary = forward.find_rotary()
        rope = forward.rope
        if forward.text_valid is not None:
            rope = rope.gather(-1, _last(forward.text_valid[:, -n:]))
        raw = rotary(query.float(), rope, inverse=True)
        own = view.index[:, 0, -n:]
        counted = view.valid[:, 0, -n:] & (own >= needs.moments_after)
        view = replace(view, rotary=rotary, moments=Moments.of(raw, counted))
    return view


def _table(forward: Forward) -> LayerView:
    """The bare table of a forward's rows, those that are not valid moved to the front."""
    rows = forward.rows
    keys, values, positions = rows.keys.detach(), rows.values.detach(), rows.text_positions()
    b, _, t = positions.shape
    valid, index = positions >= 0, positions
    n_seen = torch.full((b,), t, device=keys.device)
    if rows.positions is not None:
        n_seen = positions[:, 0, -1].long() + 1
    if forward.text_valid is not None:
        text = forward.text_valid
        own = text.cumsum(-1, dtype=torch.int32) - 1
        column = positions.clamp(min=0).long().flatten(1)
        valid = valid & text.gather(1, column).view_as(positions)
        index = own.gather(1, column).view_as(positions)
        n_seen = text.sum(-1)
    if forward.text_valid is not None or not rows.full:
        order = _last(valid)
        keys, values = _gather(keys, order), _gather(values, order)
        positions, index, valid = (x.gather(-1, order) for x in (positions, index, valid))
    return LayerView(
        keys=keys,
        values=values,
        positions=positions,
        index=index,
        valid=valid,
        n_seen=n_seen,
        n_kept=n_seen,
        next_position=_next_position(forward),
        layer=forward.layer,
        n_layers=forward.n_layers,
        rule=forward.rule,
    )


def _next_position(forward: Forward) -> Tensor:
    """The position after the last token of each sequence, ``[B]``."""
    rope = forward.rope
    if forward.text_valid is not None:
        rope = rope.masked_fill(~forward.text_valid[:, -rope.shape[1] :], -1)
    return rope.amax(-1) + 1


def _last(flags: Tensor) -> Tensor:
    """Order of the last axis that puts the flagged entries last, both groups in their order."""
    return flags.byte().argsort(dim=-1, stable=True)


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """Rows of ``x [B, X, T, D]`` in the given order ``[B, X or 1, T]``."""
    return x.gather(2, order.unsqueeze(-1).expand(*x.shape[:2], -1, x.shape[-1]))


def _times_seen(view: LayerView, n: int) -> Tensor:
    """How many of the last ``n`` queries could attend to each row, ``[B, H, T]``."""
    t = view.valid.shape[-1]
    real = view.valid[..., -n:].sum(-1, keepdim=True)
    later = torch.arange(t, 0, -1, device=view.valid.device)
    return torch.minimum(later, real)
