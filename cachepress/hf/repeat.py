"""Lets a model repeat what it read, and shows a press which rows each layer read for that."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from cachepress.cache import fork
from cachepress.core import Press
from cachepress.errors import CachepressError
from cachepress.forward import Forward, Rows
from cachepress.hf.attention import READ_WHOLE, WATCHED, Seen
from cachepress.hf.capture import Capture
from cachepress.hf.wiring import attention_modules, cache_argument, install_stores, last_layer
from cachepress.ops import wide, wide_dtype
from cachepress.replay import Chunk, Replay, ReplayView, chunks
from cachepress.stores import Store
from cachepress.trace import Trace

_T = TypeVar("_T")


class Read(NamedTuple):
    """A layer whose prompt was read, and that is settled when the model has repeated it."""

    press: Press
    store: Store
    forward: Forward
    trace: Trace


class _Text(NamedTuple):
    """What one sequence read.

    Attributes:
        columns: the tokens' columns among the last ``n`` of the text.
        n: columns that were read, padding included.
        valid: ``[1, S]`` bool, which text columns are tokens; None when all are.
    """

    columns: Tensor
    n: int
    valid: Tensor | None


@dataclass
class _Look:
    """One layer of a forward that repeats a chunk.

    Attributes:
        replay: what is looked at.
        capture: what hooks keep of that forward.
        sinks: rows of the table that stand for the beginning of the text.
        chunk: the chunk's rows, counted back from the first row of the replay.
        view: what was seen.
        module: the attention module.
    """

    replay: Replay
    capture: Capture
    sinks: Tensor
    chunk: Tensor
    view: ReplayView = field(init=False)
    module: nn.Module = field(init=False)

    @property
    def differentiates(self) -> bool:
        """Whether gradients must flow through the rows of the forward."""
        return self.replay.gradient

    def note(self, seen: Seen) -> None:
        """Look at the rows and queries of a layer."""
        rows, query = seen.rows, seen.query
        _, h, t, _ = rows.keys.shape
        n = query.shape[2]
        own = torch.arange(t - n, t, device=query.device)
        index = torch.cat([self.sinks.to(own), self.chunk.to(own) + t - n, own])
        weighs = self.replay.weighs
        self.module = seen.module
        self.view = ReplayView(
            queries=query.detach().view(1, h, -1, n, query.shape[-1]),
            keys=rows.keys[:, :, index].detach(),
            values=rows.values[:, :, index].detach(),
            valid=rows.text_positions()[:, :, index] >= 0,
            chunk=slice(len(self.sinks), len(self.sinks) + len(self.chunk)),
            rule=seen.rule,
            projection=self.capture.projection(seen) if weighs else None,
            hidden=self.capture.hidden(seen) if weighs else None,
        )


class Repeater:
    """Notes what a model reads, and lets it repeat that.

    Args:
        press: who asks.
        model: the model.
        tokenizer: its tokenizer, if the press asks in words.
        capture: what hooks keep of a forward.
    """

    def __init__(
        self,
        press: Press,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        capture: Capture,
    ) -> None:
        self._press, self._model, self._decoder = press, model, model.get_decoder()
        self._tokenizer, self._capture = tokenizer, capture
        self._cache: Cache | None = None
        self._ids: list[Tensor] = []
        self._layers: list[Read] = []

    def read(self, cache: Cache, ids: object) -> None:
        """Note what a forward reads, and into which cache."""
        if not isinstance(ids, Tensor):
            raise CachepressError(
                f"{self._press!r} replays the prompt as token ids: give input_ids, not embeddings"
            )
        self._cache = cache
        self._ids.append(ids)

    def wait(self, layer: Read) -> None:
        """Let a layer wait until the forward is done."""
        needs = layer.press.needs
        forward = resolved(layer.forward, needs.rotates, needs.projection)
        self._layers.append(layer._replace(forward=forward))

    def clear(self, ids: bool) -> None:
        """Forget the forward; with ``ids``, what was read as well."""
        self._layers.clear()
        self._cache = None
        if ids:
            self._ids.clear()

    def repeat(self) -> list[Read]:
        """Let the model repeat what it read; the layers that wait, with what that showed."""
        if not self._layers:
            return []
        layers, cache, ids = self._layers, self._cache, torch.cat(self._ids, dim=1)
        replay, valid = layers[0].press.replay, layers[0].forward.text_valid
        assert replay is not None and cache is not None
        b, n = ids.shape
        notes = [
            layer.forward.query.new_zeros(
                b, layer.store.lengths.shape[1], n, dtype=wide_dtype(layer.forward.query)
            )
            for layer in layers
        ]
        for row in range(b):
            branch = fork(cache)
            if b > 1:
                branch.reorder_cache(torch.tensor([row], device=ids.device))
            columns = torch.arange(n, device=ids.device)
            if valid is not None:
                columns = valid[row, -n:].nonzero()[:, 0]
            if not len(columns):
                continue
            text = _Text(columns, n, None if valid is None else valid[row : row + 1])
            for chunk in chunks(replay, ids[row : row + 1, columns], self._tokenizer):
                views = self._repeated(replay, branch, chunk, text)
                some = columns[chunk.start : chunk.stop]
                for layer, note, view in zip(layers, notes, views, strict=True):
                    note[row][:, some] = layer.press.replayed(view)
        for layer, note in zip(layers, notes, strict=True):
            layer.trace.note(note)
        return [
            layer._replace(forward=replace(layer.forward, rows=layer.store.held.rows()))
            for layer in layers
        ]

    def _repeated(
        self, replay: Replay, branch: Cache, chunk: Chunk, text: _Text
    ) -> list[ReplayView]:
        """One forward that repeats a chunk, on a fork of a cache of one sequence."""
        self._capture.clear()
        cache, length = fork(branch), chunk.ids.shape[1]
        before = branch.get_seq_length() - text.n
        device = text.columns.device
        sinks = text.columns[: min(replay.n_sink, chunk.start)] + before
        if before:
            sinks = torch.arange(replay.n_sink, device=device)
        looks = []
        for store in install_stores(cache, self._model).values():
            own = text.columns[chunk.start : chunk.stop] - text.n
            look = _Look(replay, self._capture, sinks, own)
            WATCHED[store] = look
            READ_WHOLE.add(store)
            looks.append(look)
        inputs = {"input_ids": chunk.ids, cache_argument(self._decoder): cache, "use_cache": True}
        if text.valid is not None:
            inputs["attention_mask"] = F.pad(text.valid, (0, length), value=True).long()
            start = int(text.valid.sum())
            inputs["position_ids"] = torch.arange(start, start + length, device=device)[None]
        if replay.gradient:
            return self._differentiated(inputs, looks)
        self._decoder(**inputs)
        return [look.view for look in looks]

    def _differentiated(self, inputs: dict[str, object], looks: list[_Look]) -> list[ReplayView]:
        """A forward that repeats, and the gradient of its last hidden states."""
        added: dict[nn.Module, Tensor] = {}
        last: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda m, _, out: added.__setitem__(m, _first(out)))
            for module in attention_modules(self._decoder)
        ]
        layer = last_layer(self._decoder)
        hooks.append(layer.register_forward_hook(lambda m, _, out: last.append(_first(out))))
        weights = [p for p in self._model.parameters() if p.requires_grad]
        try:
            for weight in weights:
                weight.requires_grad_(False)
            with torch.inference_mode(False), torch.enable_grad():
                ids = inputs.pop("input_ids")
                embeds = self._decoder.get_input_embeddings()(ids.clone())
                self._decoder(**inputs, inputs_embeds=embeds.detach().requires_grad_())
                outputs = [added[look.module] for look in looks]
                gradients = torch.autograd.grad(wide(last[0]).square().sum(), outputs)
        finally:
            for weight in weights:
                weight.requires_grad_(True)
            for hook in hooks:
                hook.remove()
        norms = [wide(gradient).norm(dim=-1) for gradient in gradients]
        return [replace(look.view, gradient=x) for look, x in zip(looks, norms, strict=True)]


def resolved(forward: Forward, rotates: bool, projects: bool) -> Forward:
    """A forward that can be read when it is over: what has to be found in it is found."""
    return replace(
        forward,
        query=forward.query[:, :, :0].clone(),
        rows=Rows(forward.rows.keys[:, :, :0].clone(), forward.rows.values[:, :, :0].clone()),
        find_rotary=_found(forward.find_rotary, rotates),
        find_projection=_found(forward.find_projection, projects),
        hidden=None,
    )


def _found(find: Callable[[], _T], wanted: bool) -> Callable[[], _T]:
    if not wanted:
        return _not_asked  # The search would hold everything that the forward showed.
    found = find()
    return lambda: found


def _not_asked() -> NoReturn:
    raise AssertionError("a press reads what it did not declare")


def _first(output: object) -> Tensor:
    """The tensor that a module answers, alone or as the first of several."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore
