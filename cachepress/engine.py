"""Compresses a layer: from an attention call to scores, a keep mask, and what the layer stores.

This is where a press, its budget and a cache layer meet. It does not decide when to compress (the
session does, by the press's schedule), and it knows neither transformers nor how a cache layer
stores pairs. Shape letters are explained in ``cachepress.view``.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.budgets import Budget, TopK
from cachepress.cache.pairs import PairBytes, Pairs
from cachepress.cache.snapshot import Snapshot
from cachepress.call import AttentionCall
from cachepress.errors import CachepressError
from cachepress.ops import (
    blocks,
    following,
    on_device,
    wide,
    without_autocast,
    without_gradient,
)
from cachepress.ops.paged_attention.parts import LOWEST
from cachepress.press import BasePress, WrapperPress, with_inner
from cachepress.query_stats import QueryStats
from cachepress.view import LayerView, Rotary

_MERGED = (
    "there is no gradient through pairs that others were merged into: run the forward that merges "
    "them under torch.no_grad(), or use the press inside without the one that merges"
)


_OBSERVED = [
    "queries",
    "voters",
    "moments",
    "projection",
    "attention_sums",
    "attention_counts",
    "hidden_feature",
]
"""Fields of a view that scores are made of, and that only the methods of ``_LATER`` need later."""
_LATER = ("merge", "pair_bias", "key_channels")
"""Methods of a press that are called when it is known which pairs are kept."""


class CacheLayer(Protocol):
    """Interface of a cache layer that can be compressed: it stores the pairs that are kept."""

    @property
    def snapshot(self) -> Snapshot:
        """What the layer holds now."""
        ...

    def pair_bytes(
        self, pairs: Pairs, compaction: bool, token_state: bool, pair_bias: bool, /
    ) -> PairBytes:
        """Compute the bytes that the kept pairs of a head will need."""
        ...

    def restore(self) -> None:
        """Store pairs as the model computed them, without spare memory, if none was ever evicted.

        A layer that keeps everything then costs no byte and no time more than an ordinary one.
        """
        ...

    @property
    def recodes(self) -> bool:
        """Whether kept pairs are stored in another form than the model computed them in."""
        ...

    def keep(
        self,
        pairs: Pairs,
        mask: Tensor,
        text_valid: Tensor | None,
        key_channels: Tensor | None,
        lengths: tuple[int, ...] | None,
        /,
    ) -> None:
        """Store exactly the pairs of ``mask [B, H, T]``, in their order.

        ``text_valid [B, S]`` says which text columns are tokens; None for all.
        ``key_channels [B, H, D]`` says which channels of the keys are stored; None for all.
        ``lengths`` says how many pairs each head keeps; None if that is not known.
        """
        ...


@dataclass(frozen=True)
class Pending:
    """A layer that is scored, and whose pairs will compete with those of the other layers.

    Attributes:
        layer: the cache layer, which still holds all of its pairs.
        call: the attention call after which it is compressed, without what is large.
        view: the view that was scored, without its keys and values.
        scores: ``[B, H, T]``.
        token_state: the number that is kept with each token, or None.
        text_valid: ``[B, S]`` which text columns are tokens; None for all.
    """

    layer: CacheLayer
    call: AttentionCall
    view: LayerView
    scores: Tensor
    token_state: Tensor | None
    text_valid: Tensor | None

    @classmethod
    def of(
        cls,
        press: BasePress,
        layer: CacheLayer,
        call: AttentionCall,
        view: LayerView,
        scores: Tensor,
    ) -> "Pending":
        """Hold what is needed of a layer until the other layers are scored.

        That is no copy of pairs that the layer holds, and no more queries than a press may still
        ask for.
        """
        state, queries = press.token_state(_detached(view)), _asked_later(press)
        keys, values = (x[:, :, :0].clone() for x in (view.keys, view.values))
        view = replace(view, keys=keys, values=values)
        if queries is None:
            view = replace(view, **dict.fromkeys(_OBSERVED))
        elif view.queries is not None and view.voters is not None:
            start = max(0, view.voters.shape[1] - queries)
            view = replace(
                view, queries=view.queries[..., start:, :].clone(), voters=view.voters[:, start:]
            )
        call, valid = call.when_over(False, False), call.text_valid
        return cls(layer, call, view, scores, state, valid)

    def whole_view(self) -> LayerView:
        """Return the view with the keys and values that the layer holds."""
        found = replace(self.call, read=self.layer.snapshot.rows()).view()
        return replace(self.view, keys=found.keys, values=found.values)


def compress(
    press: BasePress, layer: CacheLayer, call: AttentionCall, query_stats: QueryStats
) -> Pending | None:
    """Score the pairs of a layer and evict those with the lowest scores.

    Nothing is scored when the budget keeps every pair and the press stores them unchanged, so that
    a compression ratio of 0 costs nothing.

    Args:
        press: scores the pairs and says how many are kept.
        layer: the cache layer that holds the pairs.
        call: the attention call after which the layer is compressed.
        query_stats: what was observed since the last compression, this call included.

    Returns:
        The scored layer, if its pairs compete with those of other layers and
        ``compress_together`` has to follow; else None.
    """
    with without_autocast(call.query.device):
        return _compress(press, layer, call, query_stats)


def _compress(
    press: BasePress, layer: CacheLayer, call: AttentionCall, query_stats: QueryStats
) -> Pending | None:
    budget = press.budget
    view = replace(call.view(), pair_bytes=_pair_bytes(press, layer, call))
    counted = _counted(view, call)
    n_kept = budget.count(counted)
    lengths = _lengths(budget, counted, n_kept)
    idle = not press.needs.always and budget.holds_all(counted.valid, n_kept)
    n_kept = on_device(n_kept, view.keys.device)
    average = n_kept if n_kept.ndim == 1 else n_kept.double().mean(-1)
    view = replace(view, n_kept=average)
    if idle and budget.scope != "model":
        if _is_whole(layer, counted.valid):
            layer.restore()
        else:
            state = press.token_state(_detached(view))
            _keep(press, layer, view, view.valid, call.text_valid, state)
        return None
    view = query_stats.show(view, call)
    scores = press.score(_detached(view))
    if budget.scope == "model":
        return Pending.of(press, layer, call, view, scores)
    mask = budget.select(scores, view.valid, n_kept)
    state = press.token_state(_detached(view))
    _keep(press, layer, view, mask, call.text_valid, state, lengths)
    return None


def _counted(view: LayerView, call: AttentionCall) -> LayerView:
    """Return what a budget counts by: numbers on the host, where all pairs are known to be tokens.

    Then nothing is asked of the device to find out how many pairs are kept.
    """
    if call.pairs.positions is not None or call.text_valid is not None:
        return view
    b, h, t = view.valid.shape
    return replace(
        view, n_seen=torch.full((b,), t), valid=torch.ones(1, dtype=torch.bool).expand(b, h, t)
    )


def _lengths(budget: Budget, counted: LayerView, n_kept: Tensor) -> tuple[int, ...] | None:
    """Return how many pairs each head keeps, where that is known before they are scored."""
    chooses = isinstance(budget, TopK) and type(budget).select is TopK.select
    if not chooses or budget.scope != "head" or counted.valid.stride() != (0, 0, 0):
        return None
    b, h, t = counted.valid.shape
    counts = n_kept.view(b, -1).expand(b, h).clamp(max=t)
    return tuple(int(n) for n in counts.flatten().tolist())


def _pair_bytes(press: BasePress, layer: CacheLayer, call: AttentionCall) -> PairBytes:
    """Compute what a pair of a head costs, the head's share of the padding mask included."""
    needs = press.needs
    extras = needs.compaction, needs.token_state, needs.pair_bias
    bytes_of = layer.pair_bytes(call.pairs, *extras)
    if call.text_valid is None:
        return bytes_of
    heads = call.pairs.keys.shape[0] * call.pairs.keys.shape[1] * call.place.n_layers
    return bytes_of._replace(fixed=bytes_of.fixed + call.text_valid.nbytes / heads)


def compress_together(press: BasePress, layers: list[Pending]) -> None:
    """Let the pairs of all layers compete for one budget, and evict those with the lowest scores.

    The layers stand side by side as if they were heads of one layer. After an earlier compression
    they may hold different numbers of pairs; shorter ones are padded in front with entries that are
    not valid. Where a model is spread over several devices they compete on the first one.
    """
    device = layers[0].scores.device
    with without_autocast(device):
        _compress_together(press, layers, device)


def _compress_together(press: BasePress, layers: list[Pending], device: torch.device) -> None:
    longest = max(layer.scores.shape[-1] for layer in layers)

    def joined(numbers: list[Tensor]) -> Tensor:
        padded = [F.pad(x.to(device), (longest - x.shape[-1], 0)) for x in numbers]
        return torch.cat(padded, dim=1)

    scores = joined([wide(layer.scores) for layer in layers])  # [B, layers * H, T]
    valid = joined([layer.view.valid for layer in layers])
    h = layers[0].scores.shape[1]
    counts = torch.stack([layer.view.n_kept.to(device) for layer in layers])  # [layers, B]
    n_kept = counts.double().mean(0)
    if not press.needs.always and press.budget.holds_all(valid, n_kept):
        for layer in layers:
            if _is_whole(layer.layer, layer.view.valid):
                layer.layer.restore()
            else:
                _keep_pending(press, layer, layer.view.valid)
        return
    mask = press.budget.select(scores, valid, n_kept)
    for layer, part in zip(layers, mask.split(h, dim=1), strict=True):
        part = part[..., longest - layer.scores.shape[-1] :].to(layer.scores.device)
        _keep_pending(press, layer, part)


def _keep_pending(press: BasePress, layer: Pending, mask: Tensor) -> None:
    stored = layer.layer, layer.whole_view(), mask, layer.text_valid
    _keep(press, *stored, layer.token_state)


def _is_whole(layer: CacheLayer, valid: Tensor) -> bool:
    """Tell whether a layer that keeps every pair can store them as the model computed them.

    That is unless some are padding, or they are recoded.
    """
    return not layer.recodes and bool(valid.all())


def _keep(
    press: BasePress,
    layer: CacheLayer,
    view: LayerView,
    mask: Tensor,
    text_valid: Tensor | None,
    token_state: Tensor | None,
    lengths: tuple[int, ...] | None = None,
) -> None:
    """Keep the pairs of ``mask [B, H, T]`` and evict all others.

    The order matters: evicted pairs are merged while their keys still have the rotation that they
    were scored with, kept keys are rotated after that, and key channels are chosen last, since they
    are channels of the keys as they will be stored.
    """
    given = _detached(view)
    bias = _bias(press, given, mask)
    pairs = Pairs(view.keys, view.values, view.positions, token_state=token_state, bias=bias)
    merged = press.merge(given, mask)
    if merged is not None:
        keys = _merged(view.keys, given.keys, merged[0])
        values = _merged(view.values, given.values, merged[1])
        pairs = replace(pairs, keys=keys, values=values)
        view = replace(view, keys=keys, values=values)
    if press.needs.compaction and view.rotary is not None:
        with following(view.keys):
            keys, rope = _compacted(view, view.rotary, mask)
        pairs = replace(pairs, keys=keys, rope=rope)
    stored = _detached(replace(view, keys=pairs.keys))
    layer.keep(pairs, mask, text_valid, press.key_channels(stored, mask), lengths)


def _bias(press: BasePress, view: LayerView, mask: Tensor) -> Tensor | None:
    """Return what is added to the logits of kept pairs; below the lowest number is no number."""
    bias = press.pair_bias(view, mask)
    if bias is None:
        return None
    if bias.shape != mask.shape:
        raise CachepressError(
            f"{press!r}: pair_bias has shape {tuple(bias.shape)}, wanted {tuple(mask.shape)}, a "
            "number for each pair of each KV head"
        )
    return wide(bias.detach()).clamp(min=LOWEST)


def _asked_later(press: BasePress) -> int | None:
    """Return the most queries that a press may ask for when it is known which pairs are kept.

    Those of all tokens are as large as the keys of several layers. None where it does neither.
    """
    usual = [getattr(kind, name) for kind in (BasePress, WrapperPress) for name in _LATER]
    asking = (
        inner
        for inner in with_inner(press)
        if not all(getattr(type(inner), name) in usual for name in _LATER)
    )
    return max((inner.needs.queries for inner in asking), default=None)


def _merged(held: Tensor, given: Tensor, merged: Tensor) -> Tensor:
    """Return what is stored of keys or values after a press merged others into them."""
    if merged is given:
        return held
    return without_gradient(merged, _MERGED) if held.requires_grad else merged


def _detached(view: LayerView) -> LayerView:
    """Return the view that a press is given: its keys and values are a part of no autograd graph.

    Pairs that are kept stay in the graph of the forward that computed them; scores have none.
    """
    return replace(view, keys=view.keys.detach(), values=view.values.detach())


def _compacted(view: LayerView, rotary: Rotary, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the keys of ``mask [B, H, T]`` to positions without gaps, and return both.

    The last kept pair of each head gets the position right before the next query, and the others
    those before it, so that the model sees them as a shorter text without gaps. Keys that are
    evicted are rotated too, to positions that mean nothing, and are stored nowhere.
    """
    rank = mask.cumsum(-1)
    rope = view.next_position[:, None, None] - rank[..., -1:] + rank - 1
    rope, parts = rope.clamp(min=0), []
    for some in blocks(rope.shape[-1], view.keys[:, :, :1].numel()):
        # Wide between the two rotations, so that keys of a half type are rounded once, not twice.
        bare = view.unrotated(some)
        rotated = rotary(bare.flatten(0, 1), rope[..., some].flatten(0, 1))
        parts.append(rotated.view_as(bare).to(view.keys.dtype))
    return torch.cat(parts, dim=2), rope
