"""What a press sees: one layer's rows, and the extras that it declared.

Shape letters, used at the end of lines where shapes change:
    B batch, H KV heads, G query heads per KV head, T rows (held plus new), N held rows,
    Q queries, D key head size, E value head size, S text columns (seen plus new).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cachepress.cache.codec import Codec
from cachepress.cache.pairs import PairBytes
from cachepress.errors import CachepressError
from cachepress.ops import AttentionRule, attention_column_sums, gather
from cachepress.reconstruction import Reconstruction

T = TypeVar("T")

EVERY = 1 << 62
"""As a number of queries: all of them."""

HiddenFeature = Callable[[Tensor, int], Tensor]
"""A number for each token and head, ``[B, H, n]``, from hidden states ``[B, n, M]`` of a layer
(given by its depth)."""


@dataclass(frozen=True)
class PageBudget:
    """How many pages of a compressed layer a decoded token reads in each KV head.

    Attributes:
        pages: pages of 32 slots.
        skip_layers: first layers (of those that are compressed) that read all of their pages.
    """

    pages: int
    skip_layers: int = 0


@dataclass(frozen=True)
class Needs:
    """What a press declares: what its scorer must observe, and how pairs are stored after it.

    What is observed is paid for only when it is declared. ``a | b`` is what two presses need that
    act together.

    Attributes:
        queries: how many of the last queries of the text, 0 for none, ``EVERY`` for all.
        moments_after: mean and covariance of the queries before RoPE, over all queries but the
            first ``moments_after`` of the text; None for none.
        attention_sums: attention that each token received, summed over the queries of the text.
        rotary: the layer's position embedding.
        projection: the layer's output projection.
        question: the queries of the question at the end of the text.
        hidden: a number computed from each token's hidden state; None for none.
        decoded_queries: most queries of decoded tokens held between two compressions; None for as
            many as ``queries``.
        reconstruction: how the model repeats the context before its layers are compressed; None
            where it does not.
        token_state: whether a number is kept with each token until the next compression, see
            ``BasePress.token_state``.
        rewrites: whether a layer is compressed even when no token is evicted, because kept pairs
            are stored differently.
        compaction: whether kept keys are rotated to positions without gaps.
        storage: how kept pairs are stored; None for as they are, or as the call says.
        page_budgets: pages that a decoded token reads; where several apply, the fewest.
    """

    queries: int = 0
    moments_after: int | None = None
    attention_sums: bool = False
    rotary: bool = False
    projection: bool = False
    question: bool = False
    hidden: HiddenFeature | None = None
    decoded_queries: int | None = None
    reconstruction: Reconstruction | None = None
    token_state: bool = False
    rewrites: bool = False
    compaction: bool = False
    storage: Codec | None = None
    page_budgets: tuple[PageBudget, ...] = ()

    @property
    def observes(self) -> bool:
        """Whether every forward must be observed, not only those that compress a layer."""
        asked = self.attention_sums or self.question or self.hidden is not None
        return bool(self.queries) or self.moments_after is not None or asked

    @property
    def observed(self) -> "Needs":
        """The part that is observed; presses that agree in it can share what was observed."""
        return replace(
            self,
            reconstruction=None,
            token_state=False,
            rewrites=False,
            compaction=False,
            storage=None,
            page_budgets=(),
        )

    @property
    def rotates(self) -> bool:
        """Whether the layer's position embedding must be found."""
        return self.rotary or self.moments_after is not None

    @property
    def speaks(self) -> bool:
        """Whether the model is asked in words to repeat its context, which takes a tokenizer."""
        return self.reconstruction is not None and self.reconstruction.speaks

    @property
    def weighs(self) -> bool:
        """Whether a reconstruction observes output projections and hidden states."""
        return self.reconstruction is not None and self.reconstruction.weighs

    @property
    def always(self) -> bool:
        """Whether a layer is compressed even when no token is evicted."""
        return self.rewrites or self.token_state

    @property
    def most_decoded(self) -> int:
        """Most queries of decoded tokens that are held between two compressions."""
        return self.queries if self.decoded_queries is None else self.decoded_queries

    def pages_read(self, depth: int) -> int | None:
        """Pages that a decoded token reads in each head of a layer; None for all.

        ``depth`` is the rank of the layer among those that are compressed.
        """
        found = (x.pages for x in self.page_budgets if depth >= x.skip_layers)
        return min(found, default=None)

    def __or__(self, other: "Needs") -> "Needs":
        """What both need.

        Raises:
            CachepressError: if they cannot be combined.
        """
        both = (self, other)
        decoded = [n.decoded_queries for n in both if n.decoded_queries is not None]
        return Needs(
            queries=max(self.queries, other.queries),
            moments_after=_common(
                [n.moments_after for n in both],
                "presses that leave out {} and {} first queries from their statistics cannot be "
                "combined: give them the same n_sink",
            ),
            attention_sums=self.attention_sums or other.attention_sums,
            rotary=self.rotary or other.rotary,
            projection=self.projection or other.projection,
            question=self.question or other.question,
            hidden=_common(
                [n.hidden for n in both],
                "presses that compute different numbers from hidden states cannot be combined: "
                "use one",
            ),
            decoded_queries=max(self.most_decoded, other.most_decoded) if decoded else None,
            reconstruction=self.reconstruction or other.reconstruction,
            token_state=self.token_state or other.token_state,
            rewrites=self.rewrites or other.rewrites,
            compaction=self.compaction or other.compaction,
            storage=_common(
                [n.storage for n in both], "presses that store pairs differently: keep one of them"
            ),
            page_budgets=tuple(dict.fromkeys((*self.page_budgets, *other.page_budgets))),
        )


def _common(values: Sequence[T | None], refusal: str) -> T | None:
    """The value that is not None, of several; different ones are refused."""
    given = [x for x in values if x is not None]
    if len(given) > 1 and given[0] != given[1]:
        raise CachepressError(refusal.format(*given))
    return given[0] if given else None


_NUMBERS = ("positions", "index", "rope", "valid", "token_state", "hidden_feature")
_ATTENTION = ("attention_sums", "attention_counts")
"""Columns of a view with a number for each row."""


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
        rope: ``[B, H, T]`` position that the key is rotated to.
        valid: ``[B, H, T]`` bool; False for padding, empty slots, and rows that are out already.
        n_seen: ``[B]`` valid rows of the text so far.
        n_kept: ``[B]`` rows that the budget leaves to each head, on average where heads compete.
        next_position: ``[B]`` the position that the next query will be rotated to.
        layer: index of the layer in the model.
        depth: rank of the layer among those that are compressed.
        n_layers: number of layers that are compressed.
        row_bytes: bytes that the store needs for a row of a head, and besides.
        rule: how the layer turns query-key products into weights.
        queries: ``[B, H, G, Q, D]`` the last Q queries as attention used them, or None.
        voters: ``[B, Q]`` bool, which of the queries are tokens, or None.
        moments: moments of the queries before RoPE, or None.
        rotary: the layer's position embedding, or None.
        projection: ``[H, G, E, M]`` output projection of each query head to M channels, or None.
        attention_sums: ``[B, H, G, T]`` attention received from all queries, or None.
        attention_counts: ``[B, H, T]`` how many queries could attend to the row, or None.
        token_state: ``[B, H, T]`` what the press kept with the token when the layer was last
            compressed, NaN for tokens that are new; None if it kept nothing.
        hidden_feature: ``[B, H, T]`` what the press computed from the token's hidden state, NaN for
            tokens of before; None if it declared nothing.
        n_question: ``[B]`` tokens at the end of the text that are the question, or None.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    index: Tensor
    rope: Tensor
    valid: Tensor
    n_seen: Tensor
    n_kept: Tensor
    next_position: Tensor
    layer: int
    depth: int
    n_layers: int
    pair_bytes: PairBytes
    rule: AttentionRule
    queries: Tensor | None = None
    voters: Tensor | None = None
    moments: Moments | None = None
    rotary: Rotary | None = None
    projection: Tensor | None = None
    attention_sums: Tensor | None = None
    attention_counts: Tensor | None = None
    token_state: Tensor | None = None
    hidden_feature: Tensor | None = None
    n_question: Tensor | None = None

    def __getitem__(self, rows: slice) -> "LayerView":
        """The same view over some of its rows; every row column is sliced, and the queries too."""
        columns = {}
        for name in ("keys", "values"):
            columns[name] = getattr(self, name)[:, :, rows]
        for name in (*_NUMBERS, *_ATTENTION):
            column = getattr(self, name)
            columns[name] = None if column is None else column[..., rows]
        if self.queries is not None and self.voters is not None:
            t, q = self.keys.shape[2], self.queries.shape[-2]
            start, stop, _ = rows.indices(t)
            own = slice(max(0, start - t + q), max(0, stop - t + q))
            columns["queries"], columns["voters"] = self.queries[..., own, :], self.voters[:, own]
        return replace(self, **columns)

    def sequence(self, b: int) -> "LayerView":
        """The same view over one sequence of the batch."""
        columns = {}
        for field in fields(self):
            column = getattr(self, field.name)
            if isinstance(column, Tensor) and field.name != "projection":
                columns[field.name] = column[b : b + 1]
        if self.moments is not None:
            mean, covariance = self.moments.mean, self.moments.covariance
            columns["moments"] = Moments(mean[b : b + 1], covariance[b : b + 1])
        return replace(self, **columns)

    def take(self, order: Tensor) -> "LayerView":
        """The same view over the rows ``order [B, H, n]`` of each head, without its queries."""
        columns: dict[str, Tensor | None] = {"queries": None, "voters": None}
        for name in ("keys", "values"):
            columns[name] = gather(getattr(self, name), order)
        for name in _NUMBERS:
            column = getattr(self, name)
            columns[name] = None if column is None else column.gather(-1, order)
        return replace(self, **columns, **dict.fromkeys(_ATTENTION))

    def columns_from(self, index: Tensor) -> Tensor:
        """The first row of each head that stands at one of ``index [n]`` in its text, or after it.

        ``[B, H, n]``; T where there is none. Finding many at once costs no more than one look.
        """
        # Rows that are out may stand anywhere: they count as the one before them.
        rising = self.index.masked_fill(~self.valid, -1).cummax(-1).values.contiguous()
        wanted = index.to(rising).expand(*rising.shape[:2], -1).contiguous()
        return torch.searchsorted(rising, wanted)

    def only(self, rows: Tensor) -> "LayerView":
        """The same view, in which the rows that are not in ``rows [B, H, T]`` are out."""
        return replace(self, valid=self.valid & rows)

    def last_queries(self, n: int) -> Tensor:
        """The last ``n`` queries (fewer if the step was shorter), ``[B, H, G, Q, D]``."""
        if self.queries is None:
            raise TypeError("the press did not declare queries in its needs")
        return self.queries[..., -n:, :]

    def window_attention(self, n: int) -> Tensor:
        """Attention that each row receives from the last ``n`` queries, ``[B, H, G, T]``.

        The mean over the queries that are tokens: fewer than ``n`` in a shorter text.
        """
        queries = self.last_queries(n)
        voters = self.voters[:, -n:]  # type: ignore
        sums = attention_column_sums(queries, self.keys, self.valid, voters, self.rule)
        return sums / voters.sum(-1).clamp(min=1)[:, None, None, None]
