"""Proves the rotary embedding of a layer on every key that it is used for.

Keys of the forward are compared with what the embedding makes of the layer's own unrotated keys.
Those of forwards before have no unrotated ones any more; for them it is known, or can be told, that
their positions and frequencies were the same.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cachepress.call import AttentionCall, Rotated
from cachepress.errors import UnsupportedError
from cachepress.hf.angles import Angles, RotaryModule, last_position, rotary_modules
from cachepress.hf.rotary import Found, NoRotary, PairRotary, find_rotary
from cachepress.hf.wiring import attention_modules, text_decoder
from cachepress.ops import wide_dtype
from cachepress.view import Rotary

_FREQUENCIES = (
    "whose frequencies change with the length of the text: keys that the cache holds were rotated "
    "by other ones; read the text at once, with cachepress.prefill, or"
)
_STEPS = (
    "and positions here do not rise by one from token to token, as those of a picture do not: they "
    "cannot be undone;"
)
_EARLIER = "and where the tokens stand that the cache holds already is not known;"
_NONE = "and no known rotary embedding gives the layer's own keys;"


class _Text(NamedTuple):
    """Positions of the tokens of a forward, as they follow from that of the last one.

    Attributes:
        rope: ``[B, n]`` positions that rise by one from token to token.
        valid: ``[B, n]`` which are tokens; None for all.
        offsets: what a token's position is more than its index in its own text, one number for all
            sequences or one for each.
        rises: whether these are the positions that the forward was given.
        plain: whether all tokens of the text are counted from 0, with padding or without it.
    """

    rope: Tensor
    valid: Tensor | None
    offsets: tuple[int, ...]
    rises: bool
    plain: bool

    @classmethod
    def of(cls, call: AttentionCall, seen: int) -> "_Text":
        """Read the positions of a call after which ``seen`` text columns were seen."""
        given, text, valid = call.place.rope, call.text_valid, None
        b, n = given.shape
        column = torch.arange(seen, device=given.device).expand(b, seen)
        index, count, padding = column, seen, torch.zeros_like(column, dtype=torch.bool)
        if text is not None:
            index, count, padding = text.cumsum(-1) - 1, text.sum(-1), ~text
            valid = text[:, -n:]
            given = given.masked_fill(~valid, -1)
        last = given.amax(-1)
        offset = torch.where(last < 0, 0, last + 1 - count)
        rope = index + offset[:, None]
        rises = (given == rope[:, -n:]) | padding[:, -n:]
        plain = torch.stack([(offset == 0).all(), ((rope == column) | padding).all()]).any()
        flags = torch.stack([rises.all(), plain]).long()
        rising, counted, *offsets = torch.cat([flags, offset]).tolist()
        offsets = offsets[:1] if len(set(offsets)) == 1 else offsets
        return cls(rope[:, -n:], valid, tuple(offsets), bool(rising), bool(counted))


class RotaryProofs:
    """Finds and proves the rotary embeddings of the layers of one model.

    Args:
        who: the press that needs them, for refusals.
        model: the model.
    """

    def __init__(self, who: str, model: PreTrainedModel) -> None:
        self._who, self._name, decoder = who, type(model).__name__, text_decoder(model)
        inside = {part for m in attention_modules(decoder) for part in m.modules()}
        self._modules = rotary_modules(decoder)
        self._shared = [found for found in self._modules if found.module not in inside]
        self._known: dict[int, Found] = {}

    def prove(self, call: AttentionCall, outputs: Mapping[nn.Module, Tensor]) -> Rotary:
        """Find the embedding of a layer, proven on all keys that the layer holds.

        Args:
            call: the attention call.
            outputs: what the submodules of the attention module computed in this forward.

        Raises:
            UnsupportedError: if there is none, or if it did not rotate all of them.
        """
        assert call.key is not None and call.key.snapshot.tail is not None
        key = call.key.snapshot.tail.keys[:, :, -call.query.shape[2] :].detach()
        held, layer = call.key.layer, call.place.layer
        text, last = _Text.of(call, call.key.snapshot.seen), last_position(call.place.rope)
        found = find_rotary(
            [module.at(last) for module in self._modules_of(call.module)],
            outputs,
            call.query.shape[1],
            key,
            text.rope,
            text.valid,
            _likely(self._known.get(layer), last),
        )
        if found is None or not (text.rises or isinstance(found.rotary, NoRotary)):
            self._refuse(layer, _NONE if text.rises else _STEPS)
        if isinstance(found.rotary, PairRotary) and call.key.fresh is None:
            self._prove_earlier(call, found.rotary, text)
        seen = call.key.snapshot.seen
        sample = _sample(found.rotary, seen, text.offsets, key)
        self._known[layer], held.rotated = found, Rotated(seen, text.offsets, sample)
        return found.rotary

    def _modules_of(self, attention: nn.Module) -> list[RotaryModule]:
        """List the rotary modules that may rotate a layer: its own, and those of no layer."""
        own = set(attention.modules())
        return [found for found in self._modules if found.module in own] + self._shared

    def _prove_earlier(self, call: AttentionCall, rotary: PairRotary, text: _Text) -> None:
        """Raise UnsupportedError unless the tokens of forwards before were rotated alike."""
        assert call.key is not None
        layer, known, device = call.place.layer, call.key.layer.rotated, call.query.device
        start = call.key.snapshot.seen - call.query.shape[2]
        if known is None or known.seen > start:
            known = Rotated(0, text.offsets, ())
            if not text.plain:
                self._refuse(layer, _EARLIER)
        if known.offsets != text.offsets:
            self._refuse(layer, _EARLIER)
        if known.seen:
            sample = _sample(rotary, known.seen, known.offsets, call.query)
            if not all(abs(a - b) < 1e-3 for a, b in zip(known.sample, sample, strict=True)):
                self._refuse(layer, _FREQUENCIES)
        if known.seen < start:
            # Of forwards in between it is only known that each ended at one of these positions.
            count = torch.tensor(known.seen, device=device)
            if call.text_valid is not None:
                count = call.text_valid[:, : known.seen].sum(-1)
            first = (count + torch.tensor(text.offsets, device=device)).amin().clamp(min=1)
            angles = cast(Angles, rotary.cos_sin)
            if angles.source.changes(first, angles.last):
                self._refuse(layer, _FREQUENCIES)

    def _refuse(self, layer: int, reason: str) -> NoReturn:
        raise UnsupportedError(
            f"{self._who} needs the position embedding of layer {layer} of {self._name}, {reason} "
            "use a press that does not need it, such as KnormPress or SnapKVPress"
        )


def _likely(known: Found | None, last: Tensor) -> Found | None:
    """Return the embedding of an earlier forward, as it rotates in one that ends at ``last``."""
    if known is None or isinstance(known.rotary, NoRotary):
        return known
    angles = cast(Angles, known.rotary.cos_sin)
    return known._replace(rotary=replace(known.rotary, cos_sin=angles.source.at(last)))


def _sample(rotary: Rotary, seen: int, offsets: tuple[int, ...], like: Tensor) -> tuple[float, ...]:
    """Compute what an embedding makes of ones at two positions of the first ``seen`` tokens."""
    positions = torch.tensor([[seen // 2, seen - 1]], device=like.device) + min(offsets)
    ones = torch.ones(1, 2, like.shape[-1], dtype=wide_dtype(like), device=like.device)
    return tuple(rotary(ones, positions).flatten().tolist())
