"""An attention call: queries, pairs, mask and output of one layer in one forward.

The attention function makes it and hands it to the hook that is set on the cache layer. The hook
is set on the layer, and not in a module global, because a layer belongs to one cache: two threads,
presses or requests on one model then never see each other's calls. Shape letters are explained in
``cachepress.view``.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cachepress.cache.handle import RowsHandle
from cachepress.cache.masks import TextMask
from cachepress.cache.pairs import PairBytes, Pairs
from cachepress.ops import AttentionRule, following, gather, valid_last
from cachepress.view import LayerView, Rotary


class Place(NamedTuple):
    """Tells where in the model and where in the text an attention call is.

    Attributes:
        layer: index of the layer in the model.
        depth: rank of the layer among those that are compressed.
        n_layers: number of layers that are compressed.
        rope: ``[B, n]`` positions that the keys and queries of the forward are rotated to.
        n_question: ``[B]`` tokens at the end of the text that are the question; None for none.
    """

    layer: int
    depth: int
    n_layers: int
    rope: Tensor
    n_question: Tensor | None = None

    def of(self, query: Tensor) -> "Place":
        """The same place for the ``query [B, H * G, n, D]`` of a layer, on its device."""
        device, rope = query.device, self.rope
        if len(rope) != len(query):  # MusicGen is given as many texts as a sequence has codebooks.
            rope = rope[:1].expand(len(query), -1)
        n_question = None if self.n_question is None else self.n_question.to(device)
        return self._replace(rope=rope.to(device), n_question=n_question)


class Features(Protocol):
    """Finds what a press may need of an attention call that attention itself is not given."""

    def rotary(self, call: "AttentionCall") -> Rotary:
        """Find the layer's position embedding, proven on the keys of the call."""
        ...

    def projection(self, call: "AttentionCall") -> Tensor:
        """Find the layer's output projection, ``[H, G, E, M]``."""
        ...

    def hidden(self, call: "AttentionCall") -> Tensor | None:
        """Find the hidden states that the layer's attention was given, ``[B, n, M]``.

        None where no press declared that it needs them.
        """
        ...


class Rotated(NamedTuple):
    """Tells what is proven of how the keys of a layer's first text columns were rotated.

    Attributes:
        seen: number of text columns.
        offsets: what a token's position is more than its index in its own text, one number for all
            sequences or one for each.
        sample: what the position embedding makes of ones at two of these positions.
    """

    seen: int
    offsets: tuple[int, ...]
    sample: tuple[float, ...]


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of one layer, after its output was computed.

    Attributes:
        module: the attention module.
        key: the handle that the cache layer gave the model in place of keys; None when the forward
            is over.
        query: ``[B, H * G, n, D]`` as attention used it.
        output: ``[B, n, H * G, E]`` as attention computed it.
        mask: the attention mask over the text.
        rule: how the layer turns query-key products into attention weights.
        place: where in the model and in the text the call is.
        features: finds what else a press may need.
        read: the pairs that attention read; None where the cache layer computed attention itself,
            without laying its pairs out.
    """

    module: nn.Module
    key: RowsHandle | None
    query: Tensor
    output: Tensor
    mask: TextMask
    rule: AttentionRule
    place: Place
    features: Features
    read: Pairs | None = None

    @cached_property
    def pairs(self) -> Pairs:
        """All pairs that the layer holds, those of this forward last."""
        if self.read is not None:
            return self.read
        assert self.key is not None
        return self.key.snapshot.rows()

    @property
    def text_valid(self) -> Tensor | None:
        """Which text columns are tokens, ``[B, S]``; None when all are."""
        return self.mask.valid

    @cached_property
    def _rotary(self) -> Rotary:
        return self.features.rotary(self)

    def rotary(self) -> Rotary:
        """Find the layer's position embedding, proven on the keys of this call."""
        return self._rotary

    def projection(self) -> Tensor:
        """Find the layer's output projection, ``[H, G, E, M]``."""
        return self.features.projection(self)

    @cached_property
    def hidden(self) -> Tensor | None:
        """Hidden states that attention was given, ``[B, n, M]``; None where no press needs them."""
        return self.features.hidden(self)

    def view(self) -> LayerView:
        """Lay out all pairs as a view, with what is not valid moved to the front."""
        return _view_of(self)

    def when_over(self, rotates: bool, projects: bool) -> "AttentionCall":
        """Copy the call without its large tensors, to be kept until the forward is over.

        Layers that wait for a context reconstruction, or for a press to be chosen, are compressed
        later than their attention call. Queries, output and pairs of every layer would not fit into
        memory until then; the cache layer still has the pairs.

        Args:
            rotates: whether the position embedding will be needed, which can only be proven now.
            projects: whether the output projection will be.
        """
        found = _Found(self.rotary() if rotates else None, self.projection() if projects else None)
        pairs, valid = self.pairs, self.text_valid
        return replace(
            self,
            key=None,
            query=self.query[:, :, :0].clone(),
            output=self.output[:, :0].clone(),
            mask=TextMask(None if valid is None else valid.long(), self.query.shape[2]),
            features=found,
            read=Pairs(pairs.keys[:, :, :0].clone(), pairs.values[:, :, :0].clone()),
        )


def _view_of(call: AttentionCall) -> LayerView:
    """Lay out a call's pairs as a view, with what is not valid moved to the front.

    A pair is stored with its text column only. Its index in its own text is the number of tokens
    before it, which is the column itself where nothing is padded. The position that its key is
    rotated to is not stored either, unless the press changed it: positions of a text rise by one,
    and the last token's is known from the forward, so that the others follow from their index.
    """
    pairs = call.pairs
    keys, values, held = pairs.keys, pairs.values, pairs.text_positions()
    b, h, t = held.shape
    # Where all heads hold the same tokens one stands for all: nothing is computed for each of them.
    positions = held[:, :1] if held.stride(1) == 0 else held
    valid, index = positions >= 0, positions
    n_seen = torch.full((b,), t, device=keys.device)
    if pairs.positions is not None:
        # The last entry of every head is a token of this forward, which no head has evicted yet.
        n_seen = positions[:, 0, -1].long() + 1
    if call.text_valid is not None:
        text = call.text_valid
        # Padding may stand on either side of a text, and between two prompts as well.
        own = text.cumsum(-1, dtype=torch.int32) - 1
        column = positions.clamp(min=0).long().flatten(1)
        valid = valid & text.gather(1, column).view_as(positions)
        index = own.gather(1, column).view_as(positions)
        n_seen = text.sum(-1)
    next_position = _next_position(call)
    rope = index + (next_position - n_seen)[:, None, None]
    if pairs.rope is not None:
        rope = torch.where(pairs.rope >= 0, pairs.rope, rope)
    numbers = [pairs.token_state, pairs.bias]
    if call.text_valid is not None or not pairs.full:
        order = valid_last(valid)  # [B, 1 or H, T]
        with following(keys, values):
            keys, values = gather(keys, order), gather(values, order)
        positions, index, valid = (x.gather(-1, order) for x in (positions, index, valid))
        rope = rope.gather(-1, order.expand_as(rope))
        numbers = [x if x is None else x.gather(-1, order.expand(b, h, t)) for x in numbers]
    positions, index, rope = (x.expand(b, h, t) for x in (positions, index, rope))
    return LayerView(
        keys=keys,
        values=values,
        positions=positions,
        index=index,
        rope=rope,
        valid=valid.expand(b, h, t).contiguous(),
        n_seen=n_seen,
        n_kept=n_seen,
        next_position=next_position,
        layer=call.place.layer,
        depth=call.place.depth,
        n_layers=call.place.n_layers,
        pair_bytes=PairBytes(0, 0),
        rule=call.rule,
        token_state=numbers[0],
        pair_bias=numbers[1],
    )


def _next_position(call: AttentionCall) -> Tensor:
    """Compute the position after the last token of each sequence, ``[B]``."""
    rope = call.place.rope
    if call.text_valid is not None:
        # What position padding was given is up to the caller: it does not count. A text that ended
        # before this forward goes on from its last token.
        rope = rope.masked_fill(~call.text_valid[:, -rope.shape[1] :], -1)
        return torch.where(rope.amax(-1) < 0, call.text_valid.sum(-1), rope.amax(-1) + 1)
    return rope.amax(-1) + 1


class _Found(NamedTuple):
    """Holds the features of a forward that is over."""

    found_rotary: Rotary | None
    found_projection: Tensor | None

    def rotary(self, call: AttentionCall) -> Rotary:
        """Return the position embedding that was found in the forward."""
        assert self.found_rotary is not None, "a press uses what its needs do not declare"
        return self.found_rotary

    def projection(self, call: AttentionCall) -> Tensor:
        """Return the output projection that was found in the forward."""
        assert self.found_projection is not None, "a press uses what its needs do not declare"
        return self.found_projection

    def hidden(self, call: AttentionCall) -> None:
        """Return None: hidden states are not held after the forward."""


class Hook(Protocol):
    """Observes the next attention call of a layer."""

    @property
    def place(self) -> Place:
        """Where in the model and in the text the call is."""
        ...

    @property
    def features(self) -> Features:
        """Finds what else a press may need of the call."""
        ...

    def observe(self, call: AttentionCall) -> None:
        """Observe the call; the output of attention is computed already, and stays as it is."""
        ...
