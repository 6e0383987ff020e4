"""The attention function of pressed models: computes attention, then lets a layer's hook observe.

It finds the layer by its key argument: the handle that the compressed layer's ``update`` returned
in place of keys. Keys that are plain tensors go to the function that the model had before. No
module global holds the state of a forward, so that threads and models never see each other.

Which function a model uses is a name in its config. Ours is selected by a name that equals the one
that was there, and only for as long as a block is open or a compressed cache of the model lives.
"""

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cachepress.cache.handle import RowsHandle, TracedHandle
from cachepress.cache.masks import BiasedMask, TextMask
from cachepress.cache.pairs import Pairs
from cachepress.cache.snapshot import Snapshot
from cachepress.cache.traced import attend_token, layer_of, take
from cachepress.call import AttentionCall
from cachepress.compiling import untraced
from cachepress.errors import UnsupportedError, cache_dropped
from cachepress.hf.step_cache import StepHandle
from cachepress.hf.watching import Attend, Watched
from cachepress.ops import AttentionRule, narrowest, without_autocast
from cachepress.ops.paged_attention.parts import LOWEST

_FEW = 16
_LOCK = Lock()


class _Name(str):
    """Equals the name of a base function wherever a model compares it, but is looked up as ours.

    Models compare the name of their attention function with "eager" and "sdpa", and look for
    "flash" in it: all of that has to come out as before. Only the tables in which transformers
    looks up functions by name go by the hash. A copy or a pickle of a model gets the plain name.
    """

    selection: "weakref.ref[Selection]"

    def __hash__(self) -> int:
        """Differ from the hash of the plain name."""
        return hash((_Name, str.__str__(self)))

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Leave the plain name."""
        return str, (str.__str__(self),)


class Selection:
    """Keeps our attention function selected on a model's config, for as long as it is referred to.

    Open blocks refer to it, and the compressed layers that the model filled, since only our
    function can read them. With the last of them the model has its own function back.

    Attributes:
        recorded: the models whose steps are recorded meanwhile.
    """

    def __init__(self, config: PretrainedConfig, base: str) -> None:
        self.recorded: WeakSet[nn.Module] = WeakSet()
        name = _register(base)
        name.selection = weakref.ref(self)
        config._attn_implementation_internal = name
        weakref.finalize(self, _restore, weakref.ref(config), name).atexit = False

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Leave nothing in a pickle: in another process nothing is selected."""
        return object, ()


def select(decoder: PreTrainedModel) -> Selection:
    """Select our attention function on a decoder; it leaves other caches to the model's own.

    Returns:
        What keeps it selected, for as long as somebody refers to it.
    """
    config = decoder.config
    with _LOCK:
        current = config._attn_implementation or "eager"
        selection = current.selection() if isinstance(current, _Name) else None
        if selection is not None:
            return selection
        return Selection(config, str.__str__(current))


def deselect(decoder: PreTrainedModel) -> None:
    """Select a decoder's own function again now, although compressed caches of it live."""
    config = decoder.config
    if isinstance(config._attn_implementation, _Name):
        config._attn_implementation_internal = str.__str__(config._attn_implementation)


def _restore(config: "weakref.ref[PretrainedConfig]", name: _Name) -> None:
    """Select the base function again, unless something else was selected since."""
    found = config()
    if found is not None and found._attn_implementation is name:
        found._attn_implementation_internal = str.__str__(name)


def _register(base: str) -> _Name:
    """Register our attention function over a base function, with the masks of that base."""
    name = _Name(base)
    AttentionInterface.register(name, partial(_attention, base=base))
    if base in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


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
    """Compute attention of whatever a cache layer gave to the model.

    Of a compressed layer it is one operator within a graph, so that torch.compile can follow.
    """
    if not isinstance(key, RowsHandle):
        masked = isinstance(attention_mask, Tensor) and attention_mask.shape[-1] > key.shape[2]
        if masked and module.training and torch.is_grad_enabled():
            raise cache_dropped()
        function = _base_function(base, type(module))
        return function(module, query, key, value, attention_mask, **kwargs)
    if isinstance(key, TracedHandle):
        mask = attention_mask if isinstance(attention_mask, Tensor) else None
        if _is_special(attention_mask, kwargs):
            return _continued(module, query, key, attention_mask, base=base, **kwargs)
        passed, rule = take(), _rule(module, query, kwargs, base)
        assert passed is not None
        options = rule.scaling, rule.softcap, rule.sinks
        return attend_token(passed.number, query, passed.keys, passed.values, mask, *options), None
    return _observed(module, query, key, value, attention_mask, base=base, **kwargs)


@untraced
def _continued(
    module: nn.Module,
    query: Tensor,
    key: TracedHandle,
    attention_mask: object,
    *,
    base: str,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Append a token and compute attention between two graphs, as where nothing is traced."""
    passed = take()
    if passed is None or passed.keys.data_ptr() != _address(key):
        raise UnsupportedError(
            "two threads decode at once in graphs that end at attention, and their tokens were "
            "mixed up: leave out torch.compile, or masks of single heads and attention weights"
        )
    layer = layer_of(passed.number)
    keys, values = layer.update(passed.keys, passed.values)
    # Within a graph the mask has more columns than there is text.
    if isinstance(attention_mask, Tensor):
        attention_mask = attention_mask[..., : layer.get_seq_length()]
    return _attention(module, query, keys, values, attention_mask, base=base, **kwargs)


def _address(key: TracedHandle) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return key.data_ptr()


@untraced
def _observed(
    module: nn.Module,
    query: Tensor,
    key: RowsHandle,
    value: Tensor,
    attention_mask: object,
    *,
    base: str,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention over all pairs of a layer; then its hook observes, and may compress it.

    The order makes compression exact: the forward that is compressed still attends to everything,
    and only later ones see fewer pairs. The hook acts once, for this forward only.
    """
    if isinstance(key, Watched):
        own = partial(_base_function(base, type(module)), module, **kwargs)
        ours = partial(_observed, module, base=base, **kwargs)
        return key.watch(query, value, attention_mask, own, cast(Attend, ours))
    if isinstance(key, StepHandle):
        return key.read(query, _rule(module, query, kwargs, base)), None
    layer, n, bias = key.layer, query.shape[2], kwargs.pop("position_bias", None)
    hook, layer.hook = layer.hook, None
    mask, rule = layer.masks.read(attention_mask, n, module), _rule(module, query, kwargs, base)
    if isinstance(bias, Tensor):
        mask = BiasedMask(attention_mask, n, bias)
    if key.fresh is None and _attends_itself(key.snapshot, n, mask, base, kwargs):
        held = key.snapshot.whole() if layer.reads_whole else key.snapshot
        pairs, output = None, (held.attend(query, mask, rule), None)
    else:
        pairs, bias = _pairs(key, query), mask.given
        if pairs.positions is not None:
            bias = _mask_of_pairs(mask, key.snapshot, pairs, query)
        function = _base_function(base, type(module))
        output = function(module, query, pairs.keys, pairs.values, bias, **kwargs)
    if hook is not None:
        place = hook.place.of(query)
        call = AttentionCall(module, key, query, output[0], mask, rule, place, hook.features, pairs)
        with torch.no_grad(), without_autocast(query.device):
            hook.observe(call)
    return output


def _pairs(key: RowsHandle, query: Tensor) -> Pairs:
    """Lay out all pairs of a layer, those of the forward last."""
    if key.fresh is not None:
        return Pairs(*key.fresh)
    pairs = key.snapshot.rows()
    if narrowest(query) != query.dtype:
        return pairs  # Autocast converts them.
    # Pairs of a forward under autocast may have other types than those of this one.
    return replace(pairs, keys=pairs.keys.to(query.dtype), values=pairs.values.to(query.dtype))


def _attends_itself(
    held: Snapshot, n: int, mask: TextMask, base: str, options: Mapping[str, object]
) -> bool:
    """Tell whether the compressed layer computes attention itself, from its pages.

    It does for few queries, where laying all pairs out would cost more than attention; over pairs
    that sequences share, which would be copied; and in place of flash attention, which takes no
    mask over pairs.
    """
    wanted = n <= _FEW or held.shared or (held.segments and "flash" in base)
    return bool(wanted) and not mask.per_head and not _is_asked_more(options)


def _is_asked_more(options: Mapping[str, object]) -> bool:
    """Tell whether attention is asked for what only the model's own function computes."""
    return bool(options.get("output_attentions") or options.get("dropout"))


def _is_special(mask: object, options: Mapping[str, object]) -> bool:
    """Tell whether attention of a token is not what the operator in a graph computes."""
    per_head = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] > 1
    return per_head or _is_asked_more(options) or options.get("position_bias") is not None


def _rule(
    module: nn.Module, query: Tensor, options: Mapping[str, object], base: str
) -> AttentionRule:
    """Find how the model's own function turns query-key products into attention weights."""
    scaling = cast(float | None, options.get("scaling"))
    if scaling is None:
        scaling = cast(float, getattr(module, "scaling", None) or query.shape[-1] ** -0.5)
    if base == "sdpa":
        # sdpa knows neither softcap nor sinks, and ignores them where a model passes them.
        return AttentionRule(scaling)
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    return AttentionRule(scaling, cast(float | None, softcap), cast(Tensor | None, sinks))


def _mask_of_pairs(mask: TextMask, held: Snapshot, pairs: Pairs, query: Tensor) -> Tensor:
    """Turn a mask over text columns into one over pairs, added to logits: ``[B, heads, n, T]``.

    The model makes its mask for the whole text. Each head holds only some of it, so the entry of a
    pair is that of its text column. Pairs of earlier forwards are mostly visible to every query;
    then only the tail is masked, and one mask serves all heads.
    """
    b, hq, n = query.shape[:3]
    positions = pairs.text_positions()  # [B, H, T]
    h, t = positions.shape[1:]
    if mask.per_head or mask.of_rows(held.start, held.text_valid) is not None:
        column = positions.clamp(min=0).long().repeat_interleave(hq // h, dim=1).unsqueeze(-2)
        bias = mask.by_head.expand(b, hq, n, -1).gather(-1, column.expand(-1, -1, n, -1))
    else:
        tail = mask.of_columns(held.start, held.seen, query.device)
        sequences = 1 if tail is None else tail.shape[0]
        bias = torch.zeros(sequences, 1, n, t, dtype=torch.float32, device=query.device)
        if tail is not None:
            bias[..., t - (held.seen - held.start) :] = tail.unsqueeze(1)
    # The bias may be float32 and the query a half type, or be made one by autocast: the lowest
    # number must fit into both.
    lowest = max(LOWEST, torch.finfo(narrowest(query)).min)
    if pairs.bias is not None:
        own = pairs.bias.repeat_interleave(hq // h, dim=1).unsqueeze(-2)
        bias = (bias + own).clamp(min=lowest)
    if not pairs.full:
        empty = (positions < 0).repeat_interleave(hq // h, dim=1).unsqueeze(-2)
        bias = bias.masked_fill(empty, lowest)
    return bias if bias.dtype == narrowest(query) else bias.clamp(min=lowest).to(query.dtype)


def _base_function(base: str, kind: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Find the function that this kind of attention module would call without us."""
    names = sys.modules[kind.__module__].__dict__
    functions = names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    function = functions.get_interface(base, names.get("eager_attention_forward"))
    if function is None:
        raise UnsupportedError(f"{kind.__name__} has no attention function named {base!r}")
    return function
