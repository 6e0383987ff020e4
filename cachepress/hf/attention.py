"""The attention function of pressed models: rows of our stores, and who looks on."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cachepress.cache.handle import RowsHandle
from cachepress.cache.masks import TextMask
from cachepress.cache.pairs import Pairs
from cachepress.cache.snapshot import Snapshot
from cachepress.call import AttentionCall
from cachepress.errors import UnsupportedError
from cachepress.ops import AttentionRule
from cachepress.ops.paged_attention.parts import LOWEST

_PREFIX = "cachepress|"
_BASES: dict[str, str] = {}
_FEW = 16


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
    """Attention in full on all pairs; then the layer's hook observes it, and may compress it."""
    function = _base_function(base, type(module))
    if not isinstance(key, RowsHandle):
        return function(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise UnsupportedError(f"{type(module).__name__} adds a position bias: not supported")
    layer, n = key.layer, query.shape[2]
    hook, layer.hook = layer.hook, None
    mask, rule = layer.masks.read(attention_mask, n, module), _rule(module, query, kwargs, base)
    differentiates = hook is not None and hook.differentiates
    own = key.fresh is None and not differentiates
    if own and _own_attention(key.snapshot, n, mask, base, kwargs):
        held = key.snapshot.whole() if layer.reads_whole else key.snapshot
        pairs, output = None, (held.attend(query, mask, rule), None)
    else:
        pairs, bias = _pairs(key, differentiates), mask.given
        if pairs.positions is not None:
            bias = _mask_of_rows(mask, key.snapshot, pairs, query)
        output = function(module, query, pairs.keys, pairs.values, bias, **kwargs)
    if hook is not None:
        place = hook.place._replace(rope=hook.place.rope.to(query.device))
        call = AttentionCall(module, key, query, output[0], mask, rule, place, hook.features, pairs)
        with torch.no_grad():
            hook.observe(call)
    return output


def _pairs(key: RowsHandle, differentiates: bool) -> Pairs:
    """All pairs of a layer, those of the forward last."""
    if key.fresh is not None:
        return Pairs(*key.fresh)
    return _with_gradient(key) if differentiates else key.snapshot.rows()


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
