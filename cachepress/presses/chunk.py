"""Chunk-wise compression: the budget is spent evenly along the text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.ops import known_counts, wide_dtype
from cachepress.press import WrapperPress
from cachepress.presses._checks import check_by_layer
from cachepress.ranks import choose
from cachepress.view import EVERY, NUMBERS, LayerView, Moments, Needs

_BYTES = 1 << 24
"""Bytes of the chunks that are copied at once."""


@dataclass(frozen=True)
class ChunkPress(WrapperPress, alias="chunk"):
    """Compresses each chunk of the text by itself, with its share of the budget.

    The budget is shared out in proportion to the chunks' lengths, and exact in total. A press that
    needs queries gets those of the chunk; chunks of an earlier prompt, whose queries are gone,
    are scored by the queries of this one. Needs what the inner press needs, for all queries. Best
    for contexts of many parts that are all asked about.

    Attributes:
        press: the press that scores.
        chunk_length: tokens of a chunk.
    """

    chunk_length: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "chunk_length")
        check_by_layer(self)

    @property
    def needs(self) -> Needs:
        """What the inner press needs, with the queries of every chunk."""
        needs = self.press.needs
        return replace(needs, queries=EVERY) if needs.queries else needs

    def score(self, view: LayerView) -> Tensor:
        """Score each chunk by the inner press, its winners above all other pairs, ``[B, H, T]``."""
        return torch.cat([self._score_one(view.sequence(b)) for b in range(len(view.n_seen))])

    def _score_one(self, view: LayerView) -> Tensor:
        """Score one sequence, ``[1, H, T]``."""
        (_, h, t), queries = view.valid.shape, self.press.needs.queries
        # One column more: scores of empty places are written there, and ignored.
        scores = view.keys.new_zeros((1, h, t + 1), dtype=wide_dtype(view.keys))
        winners, whole = torch.zeros_like(scores, dtype=torch.bool), None
        for chunks in _chunks_of(view, self.chunk_length, queries):
            part = chunks.view(queries)
            score = self.press.score(part)
            if queries and part.voters is not None and view.voters.shape[1] < t:  # type: ignore
                # A chunk of an earlier prompt: its own queries are gone, the newest ones stand in.
                gone = part.valid.any(-1).any(-1) & ~part.voters.any(-1)
                if any(known_counts(gone, 1)):
                    whole = self.press.score(view) if whole is None else whole
                    own = whole.gather(-1, chunks.columns.unsqueeze(0))
                    score = torch.where(gone[:, None, None], chunks.split(own), score)
            winning = self.press.budget.select(score, part.valid, part.n_kept)
            place = chunks.columns.unsqueeze(0).masked_fill(~chunks.join(part.valid), t)
            scores.scatter_(-1, place, chunks.join(score.to(scores.dtype)))
            winners.scatter_(-1, place, chunks.join(winning))
        return choose(scores[..., :t], winners[..., :t])


@dataclass(frozen=True)
class _Chunks:
    """Consecutive chunks of a text, laid out like the texts of a padded batch.

    Attributes:
        text: the view of the text.
        pairs: the view of the chunks' columns, one chunk after the other.
        first: number of the first chunk.
        edges: ``[H, n + 1]`` where in the text each of the ``n`` chunks begins, and where they end.
        length: tokens of a chunk, ``L``.
    """

    text: LayerView
    pairs: LayerView
    first: int
    edges: Tensor
    length: int

    @property
    def own(self) -> Tensor:
        """Which columns are of the chunk itself, ``[n, H, L]``: a shorter one has others before."""
        end, length = self.edges[:, 1:, None], self.length
        back = torch.arange(-length, 0, device=end.device)
        return (end + back >= self.edges[:, :-1, None]).transpose(0, 1)

    @property
    def columns(self) -> Tensor:
        """Columns of the text that the chunks are made of, ``[H, n * L]``."""
        return _columns(self.edges, self.length)

    def split(self, x: Tensor) -> Tensor:
        """Make a sequence of each chunk: ``[1, H, n * L, ...]`` to ``[n, H, L, ...]``."""
        return x[0].unflatten(1, (-1, self.length)).transpose(0, 1)

    def join(self, x: Tensor) -> Tensor:
        """Make one sequence of them again: ``[n, H, L]`` to ``[1, H, n * L]``."""
        return x.transpose(0, 1).flatten(1).unsqueeze(0)

    def view(self, queries: int) -> LayerView:
        """View each chunk as a text of its own, with the last ``queries`` of its tokens."""
        pairs, n, device = self.pairs, self.edges.shape[-1] - 1, self.edges.device
        starts = torch.arange(self.first, self.first + n + 1, device=device) * self.length
        limits = torch.minimum(starts, pairs.n_seen)
        # The whole budget up to there, less that before: exact in total, however it rounds.
        kept = pairs.n_kept.long() * limits // pairs.n_seen.clamp(min=1)
        moments = pairs.moments
        if moments is not None:
            both = moments.mean, moments.covariance
            moments = Moments(*(x.expand(n, *x.shape[1:]) for x in both))
        columns = {name: _or_none(getattr(pairs, name), self.split) for name in NUMBERS}
        own = replace(pairs, **columns)
        view = replace(
            own,
            keys=self.split(pairs.keys),
            values=self.split(pairs.values),
            index=own.index - starts[:-1, None, None].to(own.index),
            valid=own.valid & self.own,
            n_seen=limits.diff(),
            n_kept=kept.diff(),
            next_position=pairs.next_position.expand(n),
            moments=moments,
            n_question=_or_none(pairs.n_question, lambda x: x.expand(n)),
            n_columns=self.length,
        )
        return self._with_queries(self._with_attention(view), queries)

    def _with_attention(self, view: LayerView) -> LayerView:
        """Add the attention that the pairs of each chunk received."""
        sums, counts = self.text.attention_sums, self.text.attention_counts
        if sums is None or counts is None:
            return view
        at = self.columns.unsqueeze(0)
        sums = sums.gather(-1, at.unsqueeze(2).expand(*sums.shape[:3], -1))  # [1, H, G, n * L]
        return replace(
            view,
            attention_sums=self.split(sums.transpose(2, 3)).transpose(2, 3),
            attention_counts=self.split(counts.gather(-1, at)),
        )

    def _with_queries(self, view: LayerView, most: int) -> LayerView:
        """Add the last ``most`` queries of each chunk; 0 for all of them."""
        queries, voters = self.text.queries, self.text.voters
        if queries is None or voters is None:
            return view
        q, t = voters.shape[1], self.text.valid.shape[-1]
        keep = min(most or self.length, self.length, q)
        # Query 0 is that of column t - q. What came since the last compression is in the same
        # columns in every head.
        column = self.edges[0, 1:, None] + torch.arange(-keep, 0, device=voters.device)  # [n, keep]
        own, at = column >= self.edges[0, :-1, None], column - (t - q)
        voting = voters[0][at.clamp(min=0)] & own & (at >= 0)
        picked = queries[0].index_select(2, at.clamp(min=0).flatten())  # [H, G, n * keep, D]
        split = picked.unflatten(2, (-1, keep)).permute(2, 0, 1, 3, 4)
        return replace(view, queries=split, voters=voting)


def _chunks_of(view: LayerView, length: int, queries: int) -> Iterator[_Chunks]:
    """Cut one text into chunks, as many of them at once as fit into memory."""
    longest = view.longest()
    length = min(length, max(longest, 1))
    n, device = -(-longest // length), view.index.device
    starts = torch.arange(n + 1, device=device) * length
    edges = view.columns_from(starts)[0]  # [H, n + 1]
    # Chunks that stand where they would in a text of which nothing was evicted need no copy. On a
    # device it costs more to find out than to copy them.
    plain = 0
    if device.type == "cpu":
        plain = max(0, int((edges == starts).all(0).cumprod(0).sum()) - 1)
    size = view.keys[:, :, :length].numel() + view.values[:, :, :length].numel()
    if view.queries is not None:
        size += view.queries[..., : min(queries or length, length), :].numel()
    step = max(1, _BYTES // (size * view.keys.dtype.itemsize))
    for begin, end in ((0, plain), (plain, n)):
        for first in range(begin, end, step):
            stop = min(first + step, end)
            part = edges[:, first : stop + 1]
            if stop <= plain:
                pairs = view[first * length : stop * length]
            else:
                pairs = view.take(_columns(part, length).unsqueeze(0))
            yield _Chunks(view, pairs, first, part, length)


def _columns(edges: Tensor, length: int) -> Tensor:
    """Find the last ``length`` columns before each of ``edges [H, 1:]``, ``[H, n * length]``."""
    back = torch.arange(-length, 0, device=edges.device)
    return (edges[:, 1:, None] + back).clamp(min=0).flatten(1)


def _or_none(x: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if x is None else change(x)
