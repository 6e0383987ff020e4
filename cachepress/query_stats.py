"""Query statistics: what is observed of a layer's queries between two compressions.

They hold what presses declare in ``Needs``: the last queries, their moments, attention sums and the
hidden feature. Everything is summed up as it comes, so that no forward's full queries or attention
weights are held. A press that needs nothing but keys and values has none.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.call import AttentionCall
from cachepress.ops import (
    RunningMoments,
    attention_column_sums,
    blocks,
    gather,
    valid_last,
    wide,
    wide_dtype,
)
from cachepress.view import LayerView, Moments, Needs


class _Decoded(NamedTuple):
    """The query ``[B, H * G, 1, D]`` of a decoded token, and its rotary position ``[B, 1]``."""

    query: Tensor
    rope: Tensor


@dataclass
class QueryStats:
    """Queries, moments, attention sums and hidden feature of one layer since its last compression.

    Prompts are summed up chunk by chunk. Of decoded tokens only the last queries are held, and they
    are summed up when the layer is compressed: that keeps a decode step cheap.

    Attributes:
        needs: what is observed.
        end: text columns seen after the last forward that was observed; where the next one does not
            go on from there, the statistics are void.
    """

    needs: Needs
    end: int
    _length: int = 0
    _queries: Tensor | None = None
    _voters: Tensor | None = None
    _sums: Tensor | None = None
    _feature: Tensor | None = None
    _moments: RunningMoments | None = None
    _decoded: list[_Decoded] = field(default_factory=list)

    def add(self, call: AttentionCall) -> None:
        """Add the queries of a prompt, or of a chunk of it."""
        if self.needs.rotates:
            call.rotary()  # It is proven on unrotated keys, which later forwards do not have.
        self._add_hidden(call)
        self._add(call, call.query, call.place.rope)

    def add_decoded(self, call: AttentionCall, most: int) -> None:
        """Hold the query of a decoded token; of several the last ``most``."""
        self._add_hidden(call)
        self._decoded.append(_Decoded(call.query.detach(), call.place.rope))
        del self._decoded[: max(0, len(self._decoded) - most)]

    def set_hidden_feature(self, feature: Tensor) -> None:
        """Set the hidden feature ``[B, H, n]`` of the last ``n`` text columns."""
        self._feature = feature

    def show(self, view: LayerView, call: AttentionCall) -> LayerView:
        """Add to a view what was observed, and what else the press declared."""
        if self._decoded:
            queries, ropes = zip(*self._decoded, strict=True)
            self._decoded = []
            query, rope = torch.cat(queries, dim=2), torch.cat(ropes, dim=1)
            self._add(call, query, rope)
        view = replace(view, n_columns=self.end, queries=self._queries, voters=self._voters)
        if self._sums is not None:
            sums, counts = _ordered(self._sums, call), _times_seen(view, self._length)
            view = replace(view, attention_sums=sums, attention_counts=counts)
        if self.needs.hidden is not None or self._feature is not None:
            view = replace(view, hidden_feature=self._feature_of(view))
        if self.needs.question:
            view = replace(view, n_question=call.place.n_question)
        if self._moments is not None:
            total, mean, scatter = self._moments
            covariance = scatter / total.clamp(min=1).unsqueeze(-1)
            view = replace(view, moments=Moments(mean, covariance))
        if self.needs.rotates:
            view = replace(view, rotary=call.rotary())
        if self.needs.projection:
            view = replace(view, projection=call.projection())
        return view

    def select(self, sequences: Tensor) -> "QueryStats":
        """Return the statistics of some of the sequences ``[B']``, which may repeat."""

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, sequences)

        moments = self._moments
        if moments is not None:
            moments = RunningMoments(*(x[sequences] for x in moments))
        return QueryStats(
            self.needs,
            self.end,
            self._length,
            of(self._queries),
            of(self._voters),
            of(self._sums),
            of(self._feature),
            moments,
            [_Decoded(*(x[sequences] for x in token)) for token in self._decoded],
        )

    def _add(self, call: AttentionCall, query: Tensor, rope: Tensor) -> None:
        """Add queries ``[B, H * G, n, D]`` of tokens at ``rope [B, n]``."""
        b, _, n, d = query.shape
        h = call.pairs.keys.shape[1]
        query = query.detach().reshape(b, h, -1, n, d)  # [B, H, G, n, D]
        counted = torch.ones(b, n, dtype=torch.bool, device=query.device)
        if call.text_valid is not None:
            counted = call.text_valid[:, -n:]
        self._length += n
        most = self._most_queries(call)
        if most:
            self._add_queries(query, counted, most, call.text_valid is not None)
        if self.needs.attention_sums:
            self._add_attention(query, counted, call)
        if self.needs.moments_after is not None:
            self._add_moments(query, counted, call, rope)

    def _most_queries(self, call: AttentionCall) -> int:
        asked = 0
        if self.needs.question and call.place.n_question is not None:
            asked = int(call.place.n_question.max())
        return max(self.needs.queries, asked)

    def _add_hidden(self, call: AttentionCall) -> None:
        if self.needs.hidden is not None and call.hidden is not None:
            hidden_feature = wide(self.needs.hidden(call.hidden.detach(), call.place.depth))
            self._feature = _joined(self._feature, hidden_feature, 2)

    def _feature_of(self, view: LayerView) -> Tensor:
        """Lay the hidden feature out as the tokens of a view, ``[B, H, T]``, NaN for older tokens.

        It is held by text column, of which the last is ``end - 1``.
        """
        hidden_feature = self._feature
        if hidden_feature is None:
            return view.keys.new_full(view.valid.shape, float("nan"), dtype=wide_dtype(view.keys))
        column = view.positions.long() - (self.end - hidden_feature.shape[-1])
        picked = hidden_feature.gather(-1, column.clamp(min=0))
        return picked.masked_fill(column < 0, float("nan"))

    def _add_queries(self, query: Tensor, counted: Tensor, most: int, padded: bool) -> None:
        # Of a chunk no more is joined than can stay.
        queries, voters = _newest(query, counted, most, padded)
        if self._queries is not None:
            queries, voters = _joined(self._queries, queries, 3), _joined(self._voters, voters, 1)
            queries, voters = _newest(queries, voters, most, padded)
        self._queries, self._voters = queries, voters

    def _add_attention(self, query: Tensor, counted: Tensor, call: AttentionCall) -> None:
        keys = call.pairs.keys.detach()
        whole = call.text_valid is None and call.pairs.full
        valid = None if whole else _valid(call)
        sums = attention_column_sums(query, keys, valid, counted, call.rule)
        self._sums = sums if self._sums is None else sums + _widened(self._sums, sums)

    def _add_moments(
        self, query: Tensor, counted: Tensor, call: AttentionCall, rope: Tensor
    ) -> None:
        # The first queries of each text are left out by their index in it, padding not counted.
        n = query.shape[-2]
        index = torch.arange(self.end - n, self.end, device=query.device).expand_as(counted)
        if call.text_valid is not None:
            index = call.text_valid.cumsum(-1)[:, -n:] - 1
        counted = (counted & (index >= (self.needs.moments_after or 0)))[:, None, None]
        rotary, each = call.rotary(), query[..., :1, :].numel()
        for some in blocks(n, each):
            unrotated = rotary(wide(query[..., some, :]), rope[:, some], inverse=True)
            new = RunningMoments.of(unrotated, counted[..., some])
            self._moments = new.after(self._moments)


def _newest(queries: Tensor, voters: Tensor, most: int, padded: bool) -> tuple[Tensor, Tensor]:
    """Take the last ``most`` of ``queries [B, H, G, n, D]`` that are of tokens, ``voters [B, n]``.

    Where there are fewer, queries of padding come before them, as padding does in a view: so the
    last ones are those of the last tokens in every sequence.
    """
    n = voters.shape[1]
    start = max(0, n - most)
    if padded:
        order = valid_last(voters)[:, start:]
        heads = queries.flatten(1, 2)
        picked = gather(heads, order[:, None].expand(-1, heads.shape[1], -1))
        return picked.unflatten(1, queries.shape[1:3]), voters.gather(1, order)
    if start:
        # A copy, because a view would hold the queries of the whole prompt.
        return queries[..., start:, :].clone(), voters[:, start:]
    return queries, voters


def _widened(old: Tensor, new: Tensor) -> Tensor:
    """Extend numbers of earlier tokens ``[..., T]`` by zeros for the tokens that came since."""
    return F.pad(old, (0, new.shape[-1] - old.shape[-1]))


def _ordered(sums: Tensor, call: AttentionCall) -> Tensor:
    """Put numbers ``[B, H, G, T]`` of pairs into the order of the view: what is not valid first."""
    if call.text_valid is None and call.pairs.full:
        return sums
    order = valid_last(_valid(call))
    return sums.gather(-1, order.unsqueeze(2).expand_as(sums))


def _joined(old: Tensor | None, new: Tensor, dim: int) -> Tensor:
    return new if old is None else torch.cat([old, new], dim=dim)


def _valid(call: AttentionCall) -> Tensor:
    """Tell which pairs are of tokens, ``[B, H, T]``, in the order of the cache layer."""
    positions = call.pairs.text_positions()
    valid = positions >= 0
    if call.text_valid is not None:
        column = positions.clamp(min=0).long().flatten(1)
        valid = valid & call.text_valid.gather(1, column).view_as(positions)
    return valid


def _times_seen(view: LayerView, n: int) -> Tensor:
    """Count how many of the last ``n`` queries could attend to each token, ``[B, H, T]``."""
    t = view.valid.shape[-1]
    real = view.valid[..., -n:].sum(-1, keepdim=True)
    later = torch.arange(t, 0, -1, device=view.valid.device)
    return torch.minimum(later, real)
