"""The attention function of pressed models: rows of our stores, and who looks on."""

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cachepress.cache.handle import RowsHandle
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.masks import TextMask
from cachepress.cache.pairs import Pairs
from cachepress.cache.snapshot import Snapshot
from cachepress.errors import UnsupportedError
from cachepress.ops import AttentionRule
from cachepress.ops.ragged_attention.parts import LOWEST

_PREFIX = "cachepress|"
_BASES: dict[str, str] = {}
_FEW = 16


class Seen(NamedTuple):
    """One attention call of one layer, when it is done.

    Attributes:
        module: the attention module.
        query: ``[B, H * G, n, D]`` as attention used it.
        output: ``[B, n, H * G, E]`` what attention gave.
        key: the handle of the layer's rows.
        read: the rows as attention read them; None where the store attended itself.
        mask: the mask over the text.
        rule: how the layer turns products into weights.
    """

    module: nn.Module
    query: Tensor
    output: Tensor
    key: RowsHandle
    read: Pairs | None
    mask: TextMask
    rule: AttentionRule

    @property
    def rows(self) -> Pairs:
        """All rows of the layer."""
        return self.key.snapshot.rows() if self.read is None else self.read


class Watcher(Protocol):
    """Looks at one attention call of one layer."""

    @property
    def differentiates(self) -> bool:
        """Whether gradients must flow through the rows of the forward."""
        ...

    def note(self, seen: Seen) -> None:
        """Look at it."""
        ...


WATCHED: WeakKeyDictionary[CompressedLayer, Watcher] = WeakKeyDictionary()
"""Who looks at the next attention call of a store's layer."""
READ_WHOLE: WeakSet[CompressedLayer] = WeakSet()
"""Stores of which a forward of one token reads every row as well: it is a part of a text."""


def _nothing() -> None:
    """Stands for what is gone."""


class _LastMask(NamedTuple):
    """The mask that was read last.

    Attributes:
        mask: the mask.
        version: how often it was written to; None where torch does not count that.
        module: the attention module for which it was read, the first one in its forward.
        read: what was read.
    """

    mask: Callable[[], object]
    version: int | None
    module: Callable[[], object]
    read: TextMask


_last_mask = _LastMask(_nothing, None, _nothing, TextMask(None, 1))


def attach(model: PreTrainedModel) -> None:
    """Select our attention function on this model; it hands on all that is not our store."""
    decoder = model.get_decoder()
    current = decoder.config._attn_implementation or "eager"
    if current in _BASES:
        return
    name = _register(current)
    decoder.set_attn_implementation(name)
    if decoder.config._attn_implementation != name:
        raise UnsupportedError(
            f"{type(model).__name__} does not use transformers' attention interface: "
            "its attention cannot be observed, so its cache cannot be compressed"
        )


def detach(model: PreTrainedModel) -> None:
    """Give a model back the attention function that it had before it was pressed.

    A compressed cache cannot be used with it afterwards: that raises ForeignAttentionError.
    """
    decoder = model.get_decoder()
    base = _BASES.get(decoder.config._attn_implementation or "")
    if base is not None:
        decoder.set_attn_implementation(base)


def _register(base: str) -> str:
    """Register our attention function over a base function, with the masks of that base."""
    # transformers reads meaning into names with "flash" or "/" and would load a kernel for ours.
    name = _PREFIX + base.replace("flash", "fl").replace("/", "|")
    if name not in _BASES:
        _BASES[name] = base
        AttentionInterface.register(name, partial(_attention, base=base))
        if base in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


@torch.compiler.disable
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    *,
    base: str,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Attention in full on all rows, and then the layer is settled if it is its turn."""
    function = _base_function(base, type(module))
    if not isinstance(key, RowsHandle):
        return function(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise UnsupportedError(f"{type(module).__name__} adds a position bias: not supported")
    n = query.shape[2]
    mask, rule = _text_mask(module, attention_mask, n), _rule(module, query, kwargs, base)
    rows = None
    if key.fresh is not None:
        rows = Pairs(*key.fresh)
        output = function(module, query, *key.fresh, mask.given, **kwargs)
    elif _differentiates(key.store):
        rows = _with_gradient(key)
        bias = mask.given
        if rows.positions is not None:
            bias = _mask_of_rows(mask, key.snapshot, rows, query)
        output = function(module, query, rows.keys, rows.values, bias, **kwargs)
    elif _own_attention(key.snapshot, n, mask, base, kwargs):
        held = key.snapshot.whole() if key.store in READ_WHOLE else key.snapshot
        output = held.attend(query, mask, rule), None
    else:
        rows = key.snapshot.rows()
        bias = mask.given
        if rows.positions is not None:
            bias = _mask_of_rows(mask, key.snapshot, rows, query)
        output = function(module, query, rows.keys, rows.values, bias, **kwargs)
    watcher = WATCHED.pop(key.store, None)
    if watcher is not None:
        with torch.no_grad():
            watcher.note(Seen(module, query, output[0], key, rows, mask, rule))
    return output


def _differentiates(store: CompressedLayer) -> bool:
    watcher = WATCHED.get(store)
    return watcher is not None and watcher.differentiates


def _with_gradient(key: RowsHandle) -> Pairs:
    """All rows, those of the forward as the model computed them and can differentiate them."""
    rows, n = key.snapshot.rows(), key.added[0].shape[2]
    keys, values = (
        torch.cat([old[:, :, :-n].detach(), new], dim=2)
        for old, new in zip((rows.keys, rows.values), key.added, strict=True)
    )
    return replace(rows, keys=keys, values=values)


def _own_attention(
    held: Snapshot, n: int, mask: TextMask, base: str, options: Mapping[str, object]
) -> bool:
    """Whether the store attends itself.

    It does for few queries, over rows that sequences share, and in place of functions that take
    no mask over rows.
    """
    wanted = n <= _FEW or held.shared or (held.segments and "flash" in base)
    return bool(wanted) and not mask.per_head and not options.get("output_attentions")


def _text_mask(module: nn.Module, mask: object, n: int) -> TextMask:
    """The mask of a forward, read once for all its layers, and anew if it was written to since."""
    global _last_mask
    if not isinstance(mask, Tensor):
        return TextMask(mask, n)
    last, version = _last_mask, None if mask.is_inference() else mask._version
    if last.mask() is not mask or last.version != version or last.module() is module:
        read = TextMask(mask, n)
        last = _last_mask = _LastMask(weakref.ref(mask), version, weakref.ref(module), read)
    return last.read


def _rule(
    module: nn.Module, query: Tensor, options: Mapping[str, object], base: str
) -> AttentionRule:
    """How the base function turns products into weights, which is what we must equal."""
    scaling = cast(float | None, options.get("scaling"))
    if scaling is None:
        scaling = cast(float, getattr(module, "scaling", None) or query.shape[-1] ** -0.5)
    if base == "sdpa":
        # It knows neither a cap nor sinks, and computes without them where a model asks for them.
        return AttentionRule(scaling)
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    return AttentionRule(scaling, cast(float | None, softcap), cast(Tensor | None, sinks))


def _mask_of_rows(mask: TextMask, held: Snapshot, rows: Pairs, query: Tensor) -> Tensor:
    """A mask over text columns as one over rows, added to logits: ``[B, heads, n, T]``.

    Where only the tail hides rows from some query, one mask serves all heads.
    """
    b, hq, n = query.shape[:3]
    positions = rows.text_positions()  # [B, H, T]
    h, t = positions.shape[1:]
    if mask.per_head or mask.of_rows(held.start, held.text_valid) is not None:
        column = positions.clamp(min=0).long().repeat_interleave(hq // h, dim=1).unsqueeze(-2)
        bias = mask.by_head.expand(b, hq, n, -1).gather(-1, column.expand(-1, -1, n, -1))
    else:
        tail = mask.of_columns(held.start, held.seen, query.device)
        sequences = 1 if tail is None else tail.shape[0]
        bias = torch.zeros(sequences, 1, n, t, device=query.device)
        if tail is not None:
            bias[..., t - (held.seen - held.start) :] = tail.unsqueeze(1)
    # The bias may be float32 and the query another type: what is lowest must fit into both.
    lowest = max(LOWEST, torch.finfo(query.dtype).min)
    if not rows.full:
        empty = (positions < 0).repeat_interleave(hq // h, dim=1).unsqueeze(-2)
        bias = bias.masked_fill(empty, lowest)
    return bias if bias.dtype == query.dtype else bias.clamp(min=lowest).to(query.dtype)


@lru_cache
def _base_function(base: str, kind: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that this kind of attention module called before we were selected."""
    names = sys.modules[kind.__module__].__dict__
    functions = names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    function = functions.get_interface(base, names.get("eager_attention_forward"))
    if function is None:
        raise UnsupportedError(f"{kind.__name__} has no attention function named {base!r}")
    return function
