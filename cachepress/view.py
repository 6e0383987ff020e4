"""The view that a scorer is given: the pairs of one layer, and what its press declared to need.

``Needs`` is the declaration, ``LayerView`` the answer. Nothing here decides what is kept, and
nothing here knows transformers.

Every token has three positions. They are the same in one text without padding that was never
compressed, and differ otherwise:

* ``positions``: its column in the text as the model was given it, padding included. Attention masks
  have one entry for each text column, so whatever reads a mask goes by it.
* ``index``: its number in its own text, padding left out. Sinks, windows and chunks are counted by
  it, so that a sequence in a padded batch is compressed as it would be alone.
* ``rope``: the position that its key is rotated to. The caller of the model may choose it
  (``position_ids``), and presses that compact keys change it; whatever rotates a key goes by it.

Shape letters, used at the end of lines where shapes change:
    B batch, H KV heads, G query heads per KV head, T tokens (cached before the forward, and new),
    Q queries, D key head size, E value head size, M hidden size, S text columns (seen and new).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cachepress.cache.codec import Codec
from cachepress.cache.pairs import PairBytes
from cachepress.deprecated import Renamed
from cachepress.errors import CachepressError
from cachepress.ops import AttentionRule, attention_column_sums, gather, known_counts, wide
from cachepress.reconstruction import Reconstruction

T = TypeVar("T")

EVERY = 1 << 62
"""As a number of queries: all of them."""

HiddenFeature = Callable[[Tensor, int], Tensor]
"""Computes a number for each token and KV head, ``[B, H, n]``, from the hidden states ``[B, n, M]``
of a layer and the layer's rank among those that are compressed."""


@dataclass(frozen=True)
class PageBudget:
    """The number of pages of a compressed layer that a decoded token reads in each KV head.

    Attributes:
        pages: pages of 32 slots.
        skip_layers: first layers (of those that are compressed) that read all of their pages.
    """

    pages: int
    skip_layers: int = 0


@dataclass(frozen=True)
class Needs:
    """Declares what a press must observe of a layer, and how the pairs that it keeps are stored.

    Observing costs time and memory, and is done only where it is declared. ``a | b`` are the needs
    of two presses that act together.

    Attributes:
        queries: how many of the last queries the scorer is given; 0 for none, ``EVERY`` for all.
        moments_after: give mean and covariance of the queries before RoPE, over all queries but
            the first ``moments_after`` of the text; None for neither.
        attention_sums: give the attention that each token received, summed over all queries.
        rotary: give the layer's position embedding.
        projection: give the layer's output projection.
        question: give the queries of the question at the end of the text.
        hidden: computes the hidden feature, a number from each token's hidden state; None for none.
        decoded_queries: most queries of decoded tokens held between two compressions; None for as
            many as ``queries``.
        reconstruction: how the model is made to repeat its context before its layers are
            compressed; None where it is not.
        token_state: whether a number is kept with each token until the next compression, see
            ``BasePress.token_state``.
        pair_bias: whether a number is added to the logits of each kept pair, see
            ``BasePress.pair_bias``.
        rewrites: whether a layer is compressed even when no token is evicted, because kept pairs
            are stored differently.
        compaction: whether kept keys are rotated to positions without gaps.
        storage: how kept pairs are stored; None leaves that to ``press(model, storage=...)``.
        page_budgets: pages that a decoded token reads in each KV head; where several apply, the
            fewest.
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
    pair_bias: bool = False
    rewrites: bool = False
    compaction: bool = False
    storage: Codec | None = None
    page_budgets: tuple[PageBudget, ...] = ()

    @property
    def observes(self) -> bool:
        """Whether every forward must be observed, not only those that compress a layer.

        So it must for a position embedding, which is proven on the keys of each forward.
        """
        asked = self.attention_sums or self.question or self.hidden is not None
        return bool(self.queries) or self.rotates or asked

    @property
    def observed(self) -> "Needs":
        """The part that is observed: presses that agree in it can share their query statistics."""
        return replace(
            self,
            reconstruction=None,
            token_state=False,
            pair_bias=False,
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
        return self.rewrites or self.token_state or self.pair_bias

    @property
    def most_decoded(self) -> int:
        """Most queries of decoded tokens held between two compressions."""
        return self.queries if self.decoded_queries is None else self.decoded_queries

    def pages_read(self, depth: int) -> int | None:
        """Pages that a decoded token reads in each head of a layer; None for all.

        ``depth`` is the rank of the layer among those that are compressed.
        """
        found = (x.pages for x in self.page_budgets if depth >= x.skip_layers)
        return min(found, default=None)

    def __or__(self, other: "Needs") -> "Needs":
        """Combine the needs of two presses that act together.

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
            pair_bias=self.pair_bias or other.pair_bias,
            rewrites=self.rewrites or other.rewrites,
            compaction=self.compaction or other.compaction,
            storage=_common(
                [n.storage for n in both], "presses that store pairs differently: keep one of them"
            ),
            page_budgets=tuple(dict.fromkeys((*self.page_budgets, *other.page_budgets))),
        )


def _common(values: Sequence[T | None], refusal: str) -> T | None:
    """Return the one value that is not None, or None; raise where there are two different ones."""
    given = [x for x in values if x is not None]
    if len(given) > 1 and given[0] != given[1]:
        raise CachepressError(refusal.format(*given))
    return given[0] if given else None


NUMBERS = ("positions", "index", "rope", "valid", "token_state", "pair_bias", "hidden_feature")
_ATTENTION = ("attention_sums", "attention_counts")
"""Fields of a view with a number for each token of each head."""


class Rotary(Protocol):
    """The rotary position embedding of one layer, proven on keys that the layer computed.

    Models differ in how they lay out and scale it, so it is never rebuilt from a config.
    """

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
    """The key-value pairs of one layer as a scorer sees them, and what the press declared.

    Tokens stand in text order. Entries that are not ``valid`` (padding, and places of tokens that
    this head evicted before) stand in front of all others. So the last ``Q`` entries are the tokens
    of the last ``Q`` queries in every sequence, however it was padded.

    Attributes:
        keys: ``[B, H, T, D]``, as the model's attention used them (normed and rotated).
        values: ``[B, H, T, E]``.
        positions: ``[B, H, T]`` text column of the token, padding included; -1 if there is none.
        index: ``[B, H, T]`` number of the token in its own text, padding left out.
        rope: ``[B, H, T]`` position that the key is rotated to.
        valid: ``[B, H, T]`` bool; False where there is no token that may still be kept.
        n_seen: ``[B]`` tokens of the text so far, evicted ones included, padding left out.
        n_kept: ``[B]`` pairs that the budget lets each head keep, on average where heads compete.
        next_position: ``[B]`` the position that the next query will be rotated to.
        layer: index of the layer in the model.
        depth: rank of the layer among those that are compressed.
        n_layers: number of layers that are compressed.
        pair_bytes: bytes that a pair of a head needs in the cache, and those that a head needs
            besides.
        rule: how the layer turns query-key products into attention weights.
        queries: ``[B, H, G, Q, D]`` the last Q queries as attention used them, or None.
        voters: ``[B, Q]`` bool, which of the queries are of tokens and not of padding, or None.
        moments: moments of the queries before RoPE, or None.
        rotary: the layer's position embedding, or None.
        projection: ``[H, G, E, M]`` output projection of each query head, or None.
        attention_sums: ``[B, H, G, T]`` attention received from all queries, or None.
        attention_counts: ``[B, H, T]`` how many queries could attend to the token, or None.
        token_state: ``[B, H, T]`` the number that the press kept with the token when the layer was
            last compressed, NaN for tokens that came since; None if it kept none.
        pair_bias: ``[B, H, T]`` what is added to the logits of each pair since the layer was last
            compressed, 0 for tokens that came since; None if no pair has a bias.
        hidden_feature: ``[B, H, T]`` what ``Needs.hidden`` computed from the token's hidden state,
            or what ``BasePress.reconstructed`` computed when the context was reconstructed; NaN for
            tokens from before the last compression; None if the press declared neither.
        n_question: ``[B]`` tokens at the end of the text that are the question, or None.
        n_columns: text columns so far, padding included; None if that is not known.
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
    pair_bias: Tensor | None = None
    hidden_feature: Tensor | None = None
    n_question: Tensor | None = None
    n_columns: int | None = None

    carried = Renamed("token_state")
    noted = Renamed("hidden_feature")
    row_bytes = Renamed("pair_bytes")

    def __getitem__(self, tokens: slice) -> "LayerView":
        """Restrict the view to a slice of its tokens, and its queries to those of these tokens."""
        columns = {}
        for name in ("keys", "values"):
            columns[name] = getattr(self, name)[:, :, tokens]
        for name in (*NUMBERS, *_ATTENTION):
            column = getattr(self, name)
            columns[name] = None if column is None else column[..., tokens]
        if self.queries is not None and self.voters is not None:
            # Queries are those of the last tokens: query 0 belongs to token t - q.
            t, q = self.keys.shape[2], self.queries.shape[-2]
            start, stop, _ = tokens.indices(t)
            own = slice(max(0, start - t + q), max(0, stop - t + q))
            columns["queries"], columns["voters"] = self.queries[..., own, :], self.voters[:, own]
        return replace(self, **columns)

    def sequence(self, b: int) -> "LayerView":
        """Restrict the view to one sequence of the batch."""
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
        """Pick the tokens ``order [B, H, n]`` of each head; queries and attention are left out."""
        columns: dict[str, Tensor | None] = {"queries": None, "voters": None}
        for name in ("keys", "values"):
            columns[name] = gather(getattr(self, name), order)
        for name in NUMBERS:
            column = getattr(self, name)
            columns[name] = None if column is None else column.gather(-1, order)
        return replace(self, **columns, **dict.fromkeys(_ATTENTION))

    def columns_from(self, index: Tensor) -> Tensor:
        """Find where in the view the tokens from ``index [n]`` on begin, for each head.

        Returns:
            ``[B, H, n]``: the first entry whose ``index`` is at least the one asked for; T where
            there is none. Many are found at once, by one binary search.
        """
        # What is not valid may have any index; a search needs rising numbers, so that it counts as
        # the valid token before it.
        rising = self.index.masked_fill(~self.valid, -1).cummax(-1).values.contiguous()
        wanted = index.to(rising).expand(*rising.shape[:2], -1).contiguous()
        return torch.searchsorted(rising, wanted)

    def longest(self) -> int:
        """Return a number of tokens that no text exceeds, by which work is divided.

        On the host it is that of the longest text; of a device no more is asked than is known.
        """
        if self.n_columns is None:
            return int(self.n_seen.max())
        return max(known_counts(self.n_seen, self.n_columns))

    def only(self, tokens: Tensor) -> "LayerView":
        """Make every token invalid that is not in the mask ``tokens [B, H, T]``."""
        return replace(self, valid=self.valid & tokens)

    def unrotated(self, tokens: slice) -> Tensor:
        """Compute the keys of some tokens before RoPE, ``[B, H, n, D]``, in float32 at least."""
        if self.rotary is None:
            raise TypeError("the view was made without the rotary embedding")
        keys, rope = wide(self.keys[:, :, tokens]), self.rope[:, :, tokens]
        if rope.stride(1) == 0:
            # All heads hold the same tokens: cosines and sines are computed once for them.
            return self.rotary(keys, rope[:, 0].clamp(min=0), inverse=True)
        flat = keys.flatten(0, 1), rope.clamp(min=0).flatten(0, 1)
        return self.rotary(*flat, inverse=True).view_as(keys)

    def last_queries(self, n: int) -> Tensor:
        """Return the last ``n`` queries, fewer if there are fewer, ``[B, H, G, Q, D]``."""
        if self.queries is None:
            raise TypeError("the press did not declare queries in its needs")
        return self.queries[..., -n:, :]

    def window_attention(self, n: int) -> Tensor:
        """Compute the mean attention of the last ``n`` queries to each token, ``[B, H, G, T]``.

        The mean is over the queries that are not padding: fewer than ``n`` in a shorter text.
        """
        queries = self.last_queries(n)
        voters = self.voters[:, -n:]  # type: ignore
        sums = attention_column_sums(queries, self.keys, self.valid, voters, self.rule)
        return sums / voters.sum(-1).clamp(min=1)[:, None, None, None]
