"""The seams of the library: what a press answers, and how a layer is settled.

Shape letters are explained in ``cachepress.view``.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.cache.pairs import PairBytes, Pairs
from cachepress.call import AttentionCall
from cachepress.ops import gather, valid_last, wide
from cachepress.press import BasePress
from cachepress.query_stats import QueryStats
from cachepress.view import LayerView


class CacheLayer(Protocol):
    """What the engine asks of a cache layer: hold rows, and drop those that lost."""

    def pair_bytes(self, rows: Pairs, compacts: bool, carries: bool) -> PairBytes:
        """Bytes that the kept rows of a head will need."""
        ...

    def restore(self) -> None:
        """Hold rows as they came, without a free slot, if none was ever dropped."""
        ...

    @property
    def recodes(self) -> bool:
        """Whether rows that are kept are stored in another form than they came in."""
        ...

    def keep(
        self, rows: Pairs, mask: Tensor, text_valid: Tensor | None, key_channels: Tensor | None
    ) -> None:
        """Hold exactly the rows of ``mask [B, H, T]``, in their order.

        ``text_valid [B, S]`` says which text columns are tokens; None for all.
        ``key_channels [B, H, D]`` says which channels of the keys are stored; None for all.
        """
        ...


@dataclass(frozen=True)
class Pending:
    """A layer that is scored, and waits for the others to compete with."""

    store: CacheLayer
    view: LayerView
    scores: Tensor
    text_valid: Tensor | None


def compress(
    press: BasePress, store: CacheLayer, call: AttentionCall, query_stats: QueryStats
) -> Pending | None:
    """Score the rows of a layer and drop the losers from its store.

    Nothing is scored when the budget holds every row and the press leaves rows as they are, so
    ratio 0 costs nothing.

    Args:
        press: says what stays.
        store: holds the layer's rows.
        call: the attention call after which the layer is compressed.
        query_stats: what was observed since the last compression, this call included.

    Returns:
        The scored layer, if it competes with the others of the model; else None.
    """
    budget = press.budget
    view = replace(_table(call), pair_bytes=_pair_bytes(press, store, call))
    n_kept = budget.count(view)
    average = n_kept if n_kept.ndim == 1 else n_kept.double().mean(-1)
    view = replace(view, n_kept=average)
    idle = not press.needs.always and budget.holds_all(view.valid, n_kept)
    if idle and budget.scope != "model":
        _keep_all(press, store, view, call.text_valid)
        return None
    view = query_stats.show(view, call)
    scores = press.score(view)
    if budget.scope == "model":
        return Pending(store, view, scores, call.text_valid)
    mask = budget.select(scores, view.valid, n_kept)
    _drop(press, store, view, mask, call.text_valid)
    return None


def _pair_bytes(press: BasePress, store: CacheLayer, call: AttentionCall) -> PairBytes:
    """What a row of a head costs, the share of a head in what is known of padding included."""
    bytes_of = store.pair_bytes(call.pairs, press.needs.compaction, press.needs.token_state)
    if call.text_valid is None:
        return bytes_of
    heads = call.pairs.keys.shape[0] * call.pairs.keys.shape[1] * call.place.n_layers
    return bytes_of._replace(fixed=bytes_of.fixed + call.text_valid.nbytes / heads)


def compress_together(press: BasePress, layers: list[Pending]) -> None:
    """Let the rows of all layers compete, and drop the losers."""
    longest = max(layer.scores.shape[-1] for layer in layers)

    def joined(columns: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(x, (longest - x.shape[-1], 0)) for x in columns], dim=1)

    scores = joined([wide(layer.scores) for layer in layers])  # [B, layers * H, T]
    valid = joined([layer.view.valid for layer in layers])
    h = layers[0].scores.shape[1]
    counts = torch.stack([layer.view.n_kept for layer in layers])  # [layers, B]
    n_kept = counts.sum(0) / len(layers)
    if not press.needs.always and press.budget.holds_all(valid, n_kept):
        for layer in layers:
            _keep_all(press, layer.store, layer.view, layer.text_valid)
        return
    mask = press.budget.select(scores, valid, n_kept)
    for layer, part in zip(layers, mask.split(h, dim=1), strict=True):
        part = part[..., longest - layer.scores.shape[-1] :]
        _drop(press, layer.store, layer.view, part, layer.text_valid)


def _keep_all(
    press: BasePress, store: CacheLayer, view: LayerView, text_valid: Tensor | None
) -> None:
    """Leave every row in the store, as it came where nothing speaks against it."""
    if store.recodes or not bool(view.valid.all()):
        _drop(press, store, view, view.valid, text_valid)
    else:
        store.restore()


def _drop(
    press: BasePress, store: CacheLayer, view: LayerView, mask: Tensor, text_valid: Tensor | None
) -> None:
    """Leave the rows of ``mask [B, H, T]`` in the store."""
    rows = Pairs(view.keys, view.values, view.positions, token_state=press.token_state(view))
    merged = press.merge(view, mask)
    if merged is not None:
        rows = replace(rows, keys=merged[0], values=merged[1])
        view = replace(view, keys=merged[0], values=merged[1])
    if press.needs.compaction and view.rotary is not None:
        rank = mask.cumsum(-1)
        rope = view.next_position[:, None, None] - rank[..., -1:] + rank - 1
        keys = view.keys.flatten(0, 1)
        bare = view.rotary(wide(keys), view.rope.clamp(min=0).flatten(0, 1), inverse=True)
        turned = view.rotary(bare, rope.clamp(min=0).flatten(0, 1)).to(keys.dtype)
        rows = replace(rows, keys=turned.view_as(view.keys), rope=rope)
    store.keep(rows, mask, text_valid, press.key_channels(replace(view, keys=rows.keys), mask))


def _table(call: AttentionCall) -> LayerView:
    """The bare table of a call's pairs, those that are not valid moved to the front."""
    rows = call.pairs
    keys, values, positions = rows.keys.detach(), rows.values.detach(), rows.text_positions()
    b, _, t = positions.shape
    valid, index = positions >= 0, positions
    n_seen = torch.full((b,), t, device=keys.device)
    if rows.positions is not None:
        n_seen = positions[:, 0, -1].long() + 1
    if call.text_valid is not None:
        text = call.text_valid
        own = text.cumsum(-1, dtype=torch.int32) - 1
        column = positions.clamp(min=0).long().flatten(1)
        valid = valid & text.gather(1, column).view_as(positions)
        index = own.gather(1, column).view_as(positions)
        n_seen = text.sum(-1)
    next_position = _next_position(call)
    rope = index + (next_position - n_seen)[:, None, None]
    if rows.rope is not None:
        rope = torch.where(rows.rope >= 0, rows.rope, rope)
    token_state = rows.token_state
    if call.text_valid is not None or not rows.full:
        order = valid_last(valid)
        keys, values = gather(keys, order), gather(values, order)
        positions, index, rope, valid = (
            x.gather(-1, order) for x in (positions, index, rope, valid)
        )
        token_state = None if token_state is None else token_state.gather(-1, order)
    return LayerView(
        keys=keys,
        values=values,
        positions=positions,
        index=index,
        rope=rope,
        valid=valid,
        n_seen=n_seen,
        n_kept=n_seen,
        next_position=next_position,
        layer=call.place.layer,
        depth=call.place.depth,
        n_layers=call.place.n_layers,
        pair_bytes=PairBytes(0, 0),
        rule=call.rule,
        token_state=token_state,
    )


def _next_position(call: AttentionCall) -> Tensor:
    """The position after the last token of each sequence, ``[B]``."""
    rope = call.place.rope
    if call.text_valid is not None:
        rope = rope.masked_fill(~call.text_valid[:, -rope.shape[1] :], -1)
    return rope.amax(-1) + 1
