"""How transformers is wired: the only file that knows.

It is touched in three places: a named attention function selected on one model, the cache-layer
protocol, and the forward that first receives the cache.
"""

import copy
import inspect
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from types import TracebackType
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.configuration_utils import PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cachepress.cache import fork
from cachepress.core import Pending, Press, Turn, settle, settle_together
from cachepress.errors import CachepressError, UnsupportedError
from cachepress.forward import Forward, Rows
from cachepress.masks import TextMask
from cachepress.ops import AttentionRule
from cachepress.projection import Projections
from cachepress.replay import Chunk, ReplayView, chunks, tokenizer_of
from cachepress.rotary import CosSin, find_rotary
from cachepress.stores import Codec, Held, RowsHandle, Store
from cachepress.trace import Trace
from cachepress.view import Rotary

if TYPE_CHECKING:
    from cachepress.presses.base import BasePress

_CACHE_NAMES = ("cache", "past_key_values")
_PREFIX = "cachepress|"
_BASES: dict[str, str] = {}


@dataclass(frozen=True)
class _Watched:
    """One forward of a pressed model in which a layer is noted, or settled as well."""

    observation: "Observation"
    press: Press
    layer: int
    depth: int
    n_layers: int
    rope: Tensor
    turn: Turn
    due: bool

    def note(
        self,
        module: nn.Module,
        query: Tensor,
        output: Tensor,
        key: RowsHandle,
        rows: Rows | None,
        mask: TextMask,
        rule: AttentionRule,
    ) -> None:
        """Note what the forward showed of a layer, and settle the layer if it is due."""
        note(self, module, query, output, key, rows, mask, rule)


@dataclass(frozen=True)
class _Unreplayed:
    """A layer whose prompt was read, and that waits for the replay."""

    press: Press
    store: Store
    forward: Forward
    trace: Trace


@dataclass
class _Look:
    """One layer of a forward that repeats a chunk.

    Attributes:
        observation: whose forward it is.
        sinks: rows of the table that stand for the beginning of the text.
        chunk: the chunk's rows, counted back from the first row of the replay.
        view: what was seen.
        module: the attention module.
    """

    observation: "Observation"
    sinks: Tensor
    chunk: Tensor
    view: ReplayView = field(init=False)
    module: nn.Module = field(init=False)

    def note(
        self,
        module: nn.Module,
        query: Tensor,
        output: Tensor,
        key: RowsHandle,
        rows: Rows | None,
        mask: TextMask,
        rule: AttentionRule,
    ) -> None:
        """Look at the rows and queries of a layer."""
        rows = key.held.rows() if rows is None else rows
        _, h, t, _ = rows.keys.shape
        n, replay = query.shape[2], self.observation.press.replay
        assert replay is not None
        own = torch.arange(t - n, t, device=query.device)
        index = torch.cat([self.sinks.to(own), self.chunk.to(own) + t - n, own])
        projection = hidden = None
        if replay.weighs:
            projection = _projection_of(self.observation, module, key, output)
            hidden = self.observation.hidden.pop(module, None)
        self.module = module
        self.view = ReplayView(
            queries=query.detach().view(1, h, -1, n, query.shape[-1]),
            keys=rows.keys[:, :, index].detach(),
            values=rows.values[:, :, index].detach(),
            valid=rows.text_positions()[:, :, index] >= 0,
            chunk=slice(len(self.sinks), len(self.sinks) + len(self.chunk)),
            rule=rule,
            projection=projection,
            hidden=hidden,
        )


_WATCHED: WeakKeyDictionary[Store, "_Watched | _Look"] = WeakKeyDictionary()
_ACTIVE: list["Observation"] = []
_FEW = 16


def _no_mask() -> None:
    """Stands for a mask that is gone."""


_last_mask: tuple[Callable[[], object], TextMask] = (_no_mask, TextMask(None, 1))


class Observation:
    """``with press(model)``: the model's caches are settled by the press until exit.

    Args:
        press: the press.
        model: a transformers decoder model.
        turns: "all" to settle after every forward of several tokens, "first" after the first only.
        storage: "full", "int8", "int4", "int2", or a Codec.
        question: tokens at the end of the prompt that are the question, one number or one for each
            sequence; for presses that ask for it.
        tokenizer: the model's tokenizer, for presses that replay; None for the one that lies where
            the model came from.

    Attributes:
        chunk: for forwards that are chunks of one prompt, "hold" if the layers wait for the last
            one, "settle" if they are settled after each, and "last" for the last one.

    Raises:
        UnsupportedError: if the model cannot be compressed.
    """

    def __init__(
        self,
        press: "BasePress",
        model: PreTrainedModel,
        turns: str = "all",
        storage: str | Codec = "full",
        question: int | Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if turns not in ("all", "first"):
            raise CachepressError(f'turns: got {turns!r}, wanted "all" or "first"')
        check_model(model)
        press = press.for_model(model)
        self.press, self.model, self.turns = press, model, turns
        self.decoder = model.get_decoder()
        press.check_layers(sum(_full_attention(self.decoder.config)))
        self.codec = codec_of(press, storage)
        self.question = _question(press, question)
        self.tokenizer = tokenizer
        if press.replay is not None and press.replay.speaks and tokenizer is None:
            self.tokenizer = tokenizer_of(model)
        self.chunk: str | None = None
        self.rotary_modules: list[CosSin] = []
        self.outputs: dict[nn.Module, dict[nn.Module, Tensor]] = {}
        self.hidden: dict[nn.Module, Tensor] = {}
        self.projections = Projections()
        self._pending: dict[Press, list[Pending]] = {}
        self._cache: Cache | None = None
        self._ids: list[Tensor] = []
        self._unreplayed: list[_Unreplayed] = []
        self._covered = {m for m in model.modules() if isinstance(m, PreTrainedModel)}
        self._hooks: list[RemovableHandle] = []
        self._depth = 0

    def __enter__(self) -> None:
        attach(self.model)
        for module in self._covered:
            self._hooks += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, always_call=True),
            ]
        needs = self.press.needs
        replay = self.press.replay
        projects = needs.projection or (replay is not None and replay.weighs)
        turns_keys = needs.rotary or needs.moments_after is not None
        if turns_keys:
            self.rotary_modules = _rotary_modules(self.decoder)
        if turns_keys or projects:
            for module in _attention_modules(self.decoder):
                for child in module.children():
                    self._hooks.append(
                        child.register_forward_hook(partial(self._keep_output, module))
                    )
                    if projects:
                        self._hooks.append(child.register_forward_pre_hook(self.projections.verify))
        if needs.notes or (replay is not None and replay.weighs):
            for module in _attention_modules(self.decoder):
                self._hooks.append(
                    module.register_forward_pre_hook(self._keep_hidden, with_kwargs=True)
                )
        _ACTIVE.append(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _ACTIVE.remove(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._end_forward()

    def _before(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        later = _ACTIVE[_ACTIVE.index(self) + 1 :]
        if self._depth or any(module in other._covered for other in later):
            self._depth += 1
            return None
        given = {
            **dict(zip(inspect.signature(module.forward).parameters, args, strict=False)),
            **kwargs,
        }
        cache, added = next((given[k] for k in _CACHE_NAMES if given.get(k) is not None), None), {}
        if cache is None and _uses_cache(given, self.decoder.config):
            cache = DynamicCache(config=self.decoder.config)
            added[cache_argument(module)] = cache
        if cache is not None:
            self._begin_forward(cache, given)
        self._depth += 1
        return (args, {**_without_cache(kwargs), **added}) if added else None

    def _begin_forward(self, cache: Cache, given: Mapping[str, object]) -> None:
        stores = install_stores(cache, self.decoder.config, type(self.model).__name__)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            raise CachepressError("the forward got neither input_ids nor inputs_embeds")
        b, n = tokens.shape[:2]
        self.question_of(tokens)
        seen = cache.get_seq_length()
        since = seen + n - next(iter(stores.values())).looked_at
        turn = Turn(seen, n, since, prompt=n > 1 or self.chunk is not None)
        press = self.press.acting(turn)
        due = self._due(turn)
        if press.replay is not None and turn.prompt:
            self._note_ids(given.get("input_ids"))
            self._cache = cache
        if self.codec is not None:
            for store in stores.values():
                # Rows that are settled chunk by chunk would be quantized again and again.
                store.codec = None if self.chunk == "settle" else self.codec
        for depth, store in enumerate(stores.values()):
            pages = self.press.reads(depth)
            store.reads = store.reads if pages is None else pages
        if not due and not (press.needs.watches and self._watches(turn)):
            return
        rope = given.get("position_ids")
        if not isinstance(rope, Tensor):
            rope = torch.arange(seen, seen + n, device=tokens.device).unsqueeze(0)
        rope = rope.reshape(-1, *rope.shape[-2:])[0].expand(b, n)
        for depth, (layer, store) in enumerate(stores.items()):
            _WATCHED[store] = _Watched(self, press, layer, depth, len(stores), rope, turn, due)

    def _due(self, turn: Turn) -> bool:
        if self.chunk == "hold":
            return False
        later = self.chunk is None and turn.prompt and turn.seen > 0 and self.turns == "first"
        return not later and self.press.schedule.due(turn)

    def _watches(self, turn: Turn) -> bool:
        """Whether a forward that settles nothing has to be noted for one that will."""
        return self.chunk == "hold" or (self.press.schedule.decodes and not turn.prompt)

    def question_of(self, batch: Tensor) -> Tensor | None:
        """Tokens of the question of each sequence, ``[B]``; None where nothing was said."""
        if self.question is None:
            return None
        b = batch.shape[0]
        if len(self.question) not in (1, b):
            raise CachepressError(
                f"question: got {len(self.question)} numbers for {b} sequences, wanted one or {b}"
            )
        return torch.tensor(self.question, device=batch.device).expand(b)

    def settle(self, press: Press, store: Store, forward: Forward, trace: Trace) -> None:
        """Settle a layer, or let it wait for the others that its rows compete with."""
        pending = settle(press, store, forward, trace)
        store.looked()
        if pending is not None:
            self._pending.setdefault(press, []).append(pending)

    def wait(self, layer: "_Unreplayed") -> None:
        """Let a layer wait until the forward is done and the prompt was replayed."""
        self._unreplayed.append(layer)

    def _note_ids(self, ids: object) -> None:
        if not isinstance(ids, Tensor):
            raise CachepressError(
                f"{self.press!r} replays the prompt as token ids: give input_ids, not embeddings"
            )
        self._ids.append(ids)

    def replay(self) -> None:
        """Let the model repeat what it read, then settle the layers with what that showed."""
        layers, cache, ids = self._unreplayed, self._cache, torch.cat(self._ids, dim=1)
        replay = layers[0].press.replay
        assert replay is not None and cache is not None
        known = layers[0].forward.text_valid
        b, n = ids.shape
        notes = [
            torch.zeros(b, layer.store.lengths.shape[1], n, device=ids.device) for layer in layers
        ]
        for row in range(b):
            branch = fork(cache)
            if b > 1:
                branch.reorder_cache(torch.tensor([row], device=ids.device))
            columns = torch.arange(n, device=ids.device)
            if known is not None:
                columns = known[row, -n:].nonzero()[:, 0]
            if not len(columns):
                continue
            of_row = None if known is None else known[row : row + 1]
            for chunk in chunks(replay, ids[row : row + 1, columns], self.tokenizer):
                views = self._repeat(branch, chunk, columns, n, of_row)
                some = columns[chunk.start : chunk.stop]
                for layer, note, view in zip(layers, notes, views, strict=True):
                    note[row][:, some] = layer.press.replayed(view)
        for layer, note in zip(layers, notes, strict=True):
            layer.trace.note(note)
            forward = replace(layer.forward, rows=layer.store.held.rows())
            self.settle(layer.press, layer.store, forward, layer.trace)

    def _repeat(
        self, branch: Cache, chunk: Chunk, columns: Tensor, n: int, known: Tensor | None
    ) -> list[ReplayView]:
        """One forward that repeats a chunk, on a fork of a cache of one sequence."""
        self.outputs.clear()
        self.projections.end_forward()
        cache, seen, length = fork(branch), branch.get_seq_length(), chunk.ids.shape[1]
        replay, before = self.press.replay, seen - n
        assert replay is not None
        sinks = columns[: min(replay.n_sink, chunk.start)] + before
        if before:
            sinks = torch.arange(replay.n_sink, device=columns.device)
        looks = []
        for store in install_stores(cache, self.decoder.config, type(self.model).__name__).values():
            look = _Look(self, sinks, columns[chunk.start : chunk.stop] - n)
            _WATCHED[store] = look
            looks.append(look)
        inputs = {"input_ids": chunk.ids, cache_argument(self.decoder): cache, "use_cache": True}
        if known is not None:
            inputs["attention_mask"] = F.pad(known, (0, length), value=True).long()
            start = int(known.sum())
            inputs["position_ids"] = torch.arange(start, start + length, device=columns.device)[
                None
            ]
        self._depth += 1
        try:
            if replay.gradient:
                return self._differentiated(inputs, looks)
            self.decoder(**inputs)
        finally:
            self._depth -= 1
        return [look.view for look in looks]

    def _differentiated(self, inputs: dict[str, object], looks: list["_Look"]) -> list[ReplayView]:
        """A forward that repeats, and the gradient of its last hidden states."""
        added: dict[nn.Module, Tensor] = {}
        last: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda m, _, out: added.__setitem__(m, _first(out)))
            for module in _attention_modules(self.decoder)
        ]
        layer = _last_layer(self.decoder)
        hooks.append(layer.register_forward_hook(lambda m, _, out: last.append(_first(out))))
        weights = [p for p in self.model.parameters() if p.requires_grad]
        try:
            for weight in weights:
                weight.requires_grad_(False)
            with torch.inference_mode(False), torch.enable_grad():
                ids = inputs.pop("input_ids")
                embeds = self.decoder.get_input_embeddings()(ids.clone())
                self.decoder(**inputs, inputs_embeds=embeds.detach().requires_grad_())
                outputs = [added[look.module] for look in looks]
                gradients = torch.autograd.grad(last[0].float().square().sum(), outputs)
        finally:
            for weight in weights:
                weight.requires_grad_(True)
            for hook in hooks:
                hook.remove()
        norms = [gradient.float().norm(dim=-1) for gradient in gradients]
        return [replace(look.view, gradient=x) for look, x in zip(looks, norms, strict=True)]

    def _after(self, module: nn.Module, args: object, output: object) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        if output is not None:
            with torch.inference_mode(False), torch.no_grad():
                if self._unreplayed:
                    self.replay()
                for press, layers in self._pending.items():
                    settle_together(press, layers)
        self._end_forward()

    def _end_forward(self) -> None:
        self.outputs.clear()
        self.hidden.clear()
        self._pending.clear()
        self._unreplayed.clear()
        if self.chunk != "hold":
            self._ids.clear()
        self._cache = None
        self.projections.end_forward()
        for store in [s for s, watch in _WATCHED.items() if watch.observation is self]:
            del _WATCHED[store]

    def _keep_hidden(
        self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        if isinstance(given, Tensor) and given.ndim == 3:
            self.hidden[module] = given.detach()

    def _keep_output(
        self, attention: nn.Module, module: nn.Module, args: object, output: object
    ) -> None:
        if isinstance(output, Tensor):
            self.outputs.setdefault(attention, {})[module] = output.detach()


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedError unless the model's caches can be compressed."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"got {name}, wanted a transformers PreTrainedModel")
    if model.config.is_encoder_decoder:
        raise UnsupportedError(f"{name} is an encoder-decoder model: wanted a decoder-only model")
    if not any(_full_attention(model.get_decoder().config)):
        raise UnsupportedError(
            f"{name} has no full-attention layer: its sliding-window or linear-attention layers "
            "already bound their cache, there is nothing to compress"
        )


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
    base = _BASES.get(decoder.config._attn_implementation)
    if base is not None:
        decoder.set_attn_implementation(base)


def cache_argument(module: nn.Module) -> str:
    """The name under which this module's forward takes a cache in this transformers version."""
    parameters = inspect.signature(module.forward).parameters
    for name in _CACHE_NAMES:
        if name in parameters:
            return name
    raise UnsupportedError(f"{type(module).__name__}.forward takes no cache")


def install_stores(cache: Cache, config: PretrainedConfig, name: str) -> dict[int, Store]:
    """Put our stores in place of a cache's full-attention layers, with what those hold.

    Returns:
        The stores by layer index.

    Raises:
        UnsupportedError: if the cache is of a kind that cannot be compressed.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        raise UnsupportedError(f"got {kind} for {name}: pass a DynamicCache(), or no cache")
    template = DynamicCache(config=config).layers
    cache.layers.extend(template[len(cache.layers) :])
    stores = {}
    for index, full in enumerate(_full_attention(config)):
        layer = cache.layers[index]
        if not full:
            continue
        if not isinstance(layer, Store):
            layer = Store.adopt(layer.keys, layer.values)
            cache.layers[index] = layer
        stores[index] = layer
    return stores


def compressed_layers(model: PreTrainedModel) -> int:
    """How many layers of the model are compressed."""
    return sum(_full_attention(model.get_decoder().config))


def has_only_full_attention(model: PreTrainedModel) -> bool:
    """Whether every layer of the model keeps an ordinary, unbounded cache."""
    return all(_full_attention(model.get_decoder().config))


def _full_attention(config: PretrainedConfig) -> list[bool]:
    return [type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers]


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
    mask, rule = _text_mask(attention_mask, n), _rule(module, query, kwargs, base)
    rows = None
    if key.fresh is not None:
        rows = Rows(*key.fresh)
        output = function(module, query, *key.fresh, attention_mask, **kwargs)
    elif isinstance(_WATCHED.get(key.store), _Look) and torch.is_grad_enabled():
        rows = _with_gradient(key)
        bias = attention_mask
        if rows.positions is not None:
            bias = _mask_of_rows(mask, key.held, rows, query)
        output = function(module, query, rows.keys, rows.values, bias, **kwargs)
    elif _own_attention(key.held, n, mask, base, kwargs):
        held = key.held.whole() if _reads_all(key.store) else key.held
        output = held.attend(query, mask, rule), None
    else:
        rows = key.held.rows()
        if rows.positions is not None:
            attention_mask = _mask_of_rows(mask, key.held, rows, query)
        output = function(module, query, rows.keys, rows.values, attention_mask, **kwargs)
    watched = _WATCHED.pop(key.store, None)
    if watched is not None:
        with torch.no_grad():
            watched.note(module, query, output[0], key, rows, mask, rule)
    return output


def _with_gradient(key: RowsHandle) -> Rows:
    """All rows, those of the forward as the model computed them and can differentiate them."""
    rows, n = key.held.rows(), key.added[0].shape[2]
    keys, values = (
        torch.cat([old[:, :, :-n].detach(), new], dim=2)
        for old, new in zip((rows.keys, rows.values), key.added, strict=True)
    )
    return replace(rows, keys=keys, values=values)


def _own_attention(
    held: Held, n: int, mask: TextMask, base: str, options: Mapping[str, object]
) -> bool:
    """Whether the store attends itself.

    It does for few queries, over rows that sequences share, and in place of functions that take
    no mask over rows.
    """
    wanted = n <= _FEW or held.shared or (held.blocks and "flash" in base)
    return bool(wanted) and not mask.per_head and not options.get("output_attentions")


def _text_mask(mask: object, n: int) -> TextMask:
    """The mask of a forward, read once for all its layers."""
    global _last_mask
    known, read = _last_mask
    if known() is not mask or mask is None:
        read = TextMask(mask, n)
        _last_mask = (weakref.ref(mask) if mask is not None else _no_mask, read)
    return read


def note(
    watched: _Watched,
    module: nn.Module,
    query: Tensor,
    output: Tensor,
    key: RowsHandle,
    rows: Rows | None,
    mask: TextMask,
    rule: AttentionRule,
) -> None:
    """Note what a forward showed of a layer, and settle the layer if it is due."""
    store, press, turn = key.store, watched.press, watched.turn
    rope = watched.rope.to(query.device)
    trace = store.trace
    if trace is None or trace.needs != press.needs or trace.end != turn.seen:
        trace = Trace(press.needs, turn.seen)
    store.trace, trace.end = trace, turn.seen + turn.new
    hidden = _hidden(watched, module)
    if not turn.prompt:
        if press.needs.watches:
            trace.add_decoded(query, rope, hidden, watched.depth, press.buffer)
        if not watched.due:
            return
    forward = Forward(
        query=query,
        rows=key.held.rows() if rows is None else rows,
        text_valid=mask.valid,
        rope=rope,
        layer=watched.layer,
        depth=watched.depth,
        n_layers=watched.n_layers,
        rule=rule,
        find_rotary=partial(_find_rotary, watched, module, key, query),
        find_projection=partial(_projection_of, watched.observation, module, key, output),
        hidden=hidden,
        n_question=watched.observation.question_of(query),
    )
    if turn.prompt and press.needs.watches:
        trace.add(forward)
    if not watched.due:
        return
    if press.replay is None or not turn.prompt:
        watched.observation.settle(press, store, forward, trace)
    else:
        watched.observation.wait(_Unreplayed(press, store, _resolved(forward, press), trace))


def _resolved(forward: Forward, press: Press) -> Forward:
    """A forward that can be read when it is over: what has to be found in it is found."""
    find_rotary, find_projection = forward.find_rotary, forward.find_projection
    if press.needs.rotary or press.needs.moments_after is not None:
        rotary = find_rotary()
        find_rotary = lambda: rotary  # noqa: E731
    if press.needs.projection:
        projection = find_projection()
        find_projection = lambda: projection  # noqa: E731
    return replace(
        forward,
        query=forward.query[:, :, :0],
        rows=Rows(forward.rows.keys[:, :, :0], forward.rows.values[:, :, :0]),
        find_rotary=find_rotary,
        find_projection=find_projection,
    )


def _hidden(watched: _Watched, module: nn.Module) -> Tensor | None:
    """The hidden states that this attention module read, where the press asks for them."""
    if not watched.press.needs.notes:
        return None
    hidden = watched.observation.hidden.pop(module, None)
    if hidden is None:
        raise UnsupportedError(
            f"{watched.press!r} needs the hidden states of layer {watched.layer} of "
            f"{type(watched.observation.model).__name__}, which its attention does not take: use a "
            "press that does not need them, such as KnormPress or SnapKVPress"
        )
    return hidden


def codec_of(press: "BasePress", storage: str | Codec) -> Codec | None:
    """How rows are stored under a press, and with what the call said.

    Raises:
        CachepressError: if both the press and the call say something.
    """
    given, own = Codec.of(storage), press.storage
    if given is not None and own is not None:
        raise CachepressError(
            f"{press!r} says how rows are stored: got storage={storage!r} besides, leave it out"
        )
    return own if given is None else given


def _reads_all(store: Store) -> bool:
    """Whether the forward reads every row even if it is of one token: a chunk, or a replay."""
    chunked = any(observation.chunk is not None for observation in _ACTIVE)
    return chunked or isinstance(_WATCHED.get(store), _Look)


def _question(press: "BasePress", question: int | Sequence[int] | None) -> list[int] | None:
    """The tokens of the question of each sequence, or one number for all."""
    if question is None:
        if press.needs.question:
            raise CachepressError(
                f"{press!r} has to know which tokens are the question: give press(model, "
                "question=n), the number of tokens at the end of the prompt, or use the pipeline"
            )
        return None
    numbers = [question] if isinstance(question, int) else list(question)
    if not numbers or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise CachepressError(
            f"question: got {question!r}, wanted a number of tokens above 0, or one for each text"
        )
    return numbers


def _find_rotary(watched: _Watched, module: nn.Module, key: RowsHandle, query: Tensor) -> Rotary:
    observation = watched.observation
    outputs = list(observation.outputs.get(module, {}).values())
    assert key.held.tail is not None
    new_keys = key.held.tail.keys[:, :, -query.shape[2] :]
    found = find_rotary(observation.rotary_modules, outputs, query.shape[1], new_keys, watched.rope)
    if found is None:
        raise UnsupportedError(
            f"{watched.press!r} needs the position embedding of layer {watched.layer} of "
            f"{type(observation.model).__name__}, which could not be verified: use a press "
            "that does not need it, such as KnormPress or SnapKVPress"
        )
    return found


def _projection_of(
    observation: Observation, module: nn.Module, key: RowsHandle, output: Tensor
) -> Tensor:
    heads, done = key.shape[1], list(observation.outputs.get(module, {}))
    found = observation.projections.find(module, done, heads, output)
    if found is None:
        raise UnsupportedError(
            f"{observation.press!r} needs the output projection of each layer of "
            f"{type(observation.model).__name__}, and one could not be found: use a press without "
            "it"
        )
    return found


def _rule(
    module: nn.Module, query: Tensor, options: Mapping[str, object], base: str
) -> AttentionRule:
    """How the base function turns products into weights, which is what we must equal."""
    scaling = options.get("scaling")
    if scaling is None:
        scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
    if base == "sdpa":
        # It knows neither a cap nor sinks, and computes without them where a model asks for them.
        return AttentionRule(scaling)
    return AttentionRule(scaling, options.get("softcap"), options.get("s_aux"))


def _mask_of_rows(mask: TextMask, held: Held, rows: Rows, query: Tensor) -> Tensor:
    """A mask over text columns as one over rows, added to logits: ``[B, heads, n, T]``.

    Where only the tail hides rows from some query, one mask serves all heads.
    """
    b, hq, n = query.shape[:3]
    positions = rows.text_positions()  # [B, H, T]
    h, t = positions.shape[1:]
    if mask.per_head or mask.of_rows(held.start, held.known) is not None:
        column = positions.clamp(min=0).long().repeat_interleave(hq // h, dim=1).unsqueeze(-2)
        bias = mask.by_head.expand(b, hq, n, -1).gather(-1, column.expand(-1, -1, n, -1))
    else:
        tail = mask.of_columns(held.start, held.seen, query.device)
        sequences = 1 if tail is None else tail.shape[0]
        bias = torch.zeros(sequences, 1, n, t, device=query.device)
        if tail is not None:
            bias[..., t - (held.seen - held.start) :] = tail.unsqueeze(1)
    lowest = torch.finfo(query.dtype).min
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


def _without_cache(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in kwargs.items() if key not in _CACHE_NAMES}


def _uses_cache(given: Mapping[str, object], config: PretrainedConfig) -> bool:
    wanted = given.get("use_cache")
    return bool(getattr(config, "use_cache", True) if wanted is None else wanted)


def _attention_modules(decoder: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of full-attention layers, and what else carries such an index."""
    full = {index for index, is_full in enumerate(_full_attention(decoder.config)) if is_full}
    return [m for m in decoder.modules() if getattr(m, "layer_idx", None) in full]


def _last_layer(decoder: PreTrainedModel) -> nn.Module:
    """The last of the decoder's layers, whose output is the last hidden states before the norm."""
    n = len(_full_attention(decoder.config))
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if not lists:
        raise UnsupportedError(
            f"the layers of {type(decoder).__name__} were not found: presses that need gradients "
            "cannot be used with it"
        )
    return lists[0][-1]


def _first(output: object) -> Tensor:
    """The tensor that a module answers, alone or as the first of several."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore


def _rotary_modules(decoder: PreTrainedModel) -> list[CosSin]:
    """Copies of the modules that answer positions with cosines and sines.

    Copies, because some of them change their state when they see a long position.
    """
    found: list[CosSin] = []
    for module in decoder.modules():
        parameters = list(inspect.signature(module.forward).parameters)
        if parameters[:2] != ["x", "position_ids"]:
            continue
        module = copy.deepcopy(module)
        if "layer_type" in parameters:
            found.append(partial(_call_rotary, module, "full_attention"))
        else:
            found.append(partial(_call_rotary, module, None))
    return found


def _call_rotary(
    module: nn.Module, layer_type: str | None, x: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    return module(x, positions) if layer_type is None else module(x, positions, layer_type)
