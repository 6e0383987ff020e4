"""Lets a model repeat what it read, and shows a press which rows each layer read for that."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from cachepress.cache.batch import fork
from cachepress.cache.layer import CompressedLayer
from cachepress.call import AttentionCall, Place
from cachepress.errors import CachepressError
from cachepress.hf.capture import Capture
from cachepress.hf.chunks import Chunk, chunks, opening_of
from cachepress.hf.wiring import attention_modules, cache_argument, install_stores, last_layer
from cachepress.ops import wide, wide_dtype
from cachepress.press import BasePress
from cachepress.query_stats import QueryStats
from cachepress.reconstruction import Reconstruction, ReconstructionView

_T = TypeVar("_T")
_MOST = torch.finfo(torch.float32).max


class Waiting(NamedTuple):
    """A layer that is to be compressed, and what its press will see of it."""

    press: BasePress
    layer: CompressedLayer
    call: AttentionCall
    query_stats: QueryStats


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

    def valid_after(self, repeated: int) -> Tensor | None:
        """Which text columns are tokens when so many of a replay came behind them."""
        return None if self.valid is None else F.pad(self.valid, (0, repeated), value=True)


@dataclass
class _Hook:
    """Observes one layer of a forward that repeats a chunk.

    Attributes:
        press: the press that asks for it.
        place: where the layer is.
        features: what the model's hooks keep of that forward.
        text: what was read.
        sinks: rows of the table that stand for the beginning of the text.
        chunk: the chunk's rows, counted back from the first row of the replay.
        repeated: tokens of the replay that came in forwards before.
        before: what the press made of these.
        last: whether no chunk follows.
        view: what was seen.
        found: what the press made of it; with gradients, when those are known.
        module: the attention module.
    """

    press: BasePress
    place: Place
    features: Capture
    text: _Text
    sinks: Tensor
    chunk: Tensor
    repeated: int
    before: Tensor | None
    last: bool
    view: ReconstructionView = field(init=False)
    found: Tensor = field(init=False)
    module: nn.Module = field(init=False)

    @property
    def differentiates(self) -> bool:
        """Whether gradients must flow through the rows of the forward."""
        return self._replay.gradient

    def observe(self, call: AttentionCall) -> None:
        """Look at the pairs and queries of a layer."""
        query, weighs = call.query, self._replay.weighs
        h, n = call.pairs.keys.shape[1], query.shape[2]
        keys, values, valid, chunk = (
            self._whole(call, n) if self._replay.whole else self._part(call, n)
        )
        view = ReconstructionView(
            queries=query.detach().view(1, h, -1, n, query.shape[-1]),
            keys=keys,
            values=values,
            valid=valid,
            chunk=chunk,
            rule=call.rule,
            projection=call.projection() if weighs else None,
            hidden=call.hidden if weighs else None,
            before=self.before,
            last=self.last,
        )
        self.module = call.module
        if self._replay.gradient:
            self.view = view
        else:
            # At once, so that the rows of one layer only are held.
            self.found = self.press.reconstructed(view)

    @property
    def _replay(self) -> Reconstruction:
        reconstruction = self.press.needs.reconstruction
        assert reconstruction is not None
        return reconstruction

    def _part(self, call: AttentionCall, n: int) -> tuple[Tensor, Tensor, Tensor, slice]:
        """Keys, values and validity of the sinks, the chunk and the replay; where the chunk is."""
        rows, t = call.pairs, call.pairs.keys.shape[2]
        own = torch.arange(t - n, t, device=call.query.device)
        index = torch.cat([self.sinks.to(own), self.chunk.to(own) + t - n, own])
        keys, values = (x[:, :, index].detach() for x in (rows.keys, rows.values))
        chunk = slice(len(self.sinks), len(self.sinks) + len(self.chunk))
        return keys, values, rows.text_positions()[:, :, index] >= 0, chunk

    def _whole(self, call: AttentionCall, n: int) -> tuple[Tensor, Tensor, Tensor, slice]:
        """Those of all rows; where the text is."""
        rows, positions = call.pairs, call.pairs.text_positions()
        valid, text = positions >= 0, self.text.valid_after(self.repeated + n)
        if text is not None:
            column = positions.clamp(min=0).long().flatten(1)
            valid = valid & text.gather(1, column).view_as(valid)
        stop = positions.shape[-1] - n - self.repeated
        chunk = slice(stop - self.text.n, stop)
        return rows.keys.detach(), rows.values.detach(), valid, chunk


class Reconstructor:
    """Notes what a model reads, and lets it repeat that.

    Args:
        press: who asks.
        model: the model.
        tokenizer: its tokenizer, if the press asks in words.
        capture: what hooks keep of a forward.
    """

    def __init__(
        self,
        press: BasePress,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        capture: Capture,
    ) -> None:
        self._press, self._model, self._decoder = press, model, model.get_decoder()
        self._tokenizer, self._capture = tokenizer, capture
        self._cache: Cache | None = None
        self._ids: list[Tensor] = []
        self._layers: list[Waiting] = []

    def read(self, cache: Cache, ids: object) -> None:
        """Note what a forward reads, and into which cache."""
        if not isinstance(ids, Tensor):
            raise CachepressError(
                f"{self._press!r} replays the prompt as token ids: give input_ids, not embeddings"
            )
        self._cache = cache
        self._ids.append(ids)

    def wait(self, layer: Waiting) -> None:
        """Let a layer wait until the forward is done."""
        needs = layer.press.needs
        call = layer.call.when_over(needs.rotates, needs.projection)
        self._layers.append(layer._replace(call=call))

    def clear(self, ids: bool) -> None:
        """Forget the forward; with ``ids``, what was read as well."""
        self._layers.clear()
        self._cache = None
        if ids:
            self._ids.clear()

    def repeat(self) -> list[Waiting]:
        """Let the model repeat what it read; the layers that wait, with what that showed."""
        if not self._layers:
            return []
        layers, cache, ids = self._layers, self._cache, torch.cat(self._ids, dim=1)
        reconstruction, valid = layers[0].press.needs.reconstruction, layers[0].call.text_valid
        assert reconstruction is not None and cache is not None
        b, n = ids.shape
        notes = [
            layer.call.query.new_zeros(
                b, layer.layer.lengths.shape[1], n, dtype=wide_dtype(layer.call.query)
            )
            for layer in layers
        ]
        for row in range(b):
            branch = fork(cache)
            if b > 1:
                only = torch.tensor([row], device=ids.device)
                branch.reorder_cache(cast(torch.LongTensor, only))
            columns = torch.arange(n, device=ids.device)
            if valid is not None:
                columns = valid[row, -n:].nonzero()[:, 0]
            if len(columns):
                text = _Text(columns, n, None if valid is None else valid[row : row + 1])
                own = ids[row : row + 1, columns]
                self._repeat_one(branch, own, text, [note[row] for note in notes])
        for layer, note in zip(layers, notes, strict=True):
            layer.query_stats.set_hidden_feature(note)
        return [
            layer._replace(call=replace(layer.call, read=layer.layer.snapshot.rows()))
            for layer in layers
        ]

    def _repeat_one(self, branch: Cache, ids: Tensor, text: _Text, notes: list[Tensor]) -> None:
        """Let the model repeat one sequence ``ids [1, T]``, and note ``[H, n]`` in each layer."""
        press = self._layers[0].press
        reconstruction = press.needs.reconstruction
        assert reconstruction is not None
        opening = 0
        if reconstruction.speaks and branch.get_seq_length() == text.n:
            opening = opening_of(ids, self._tokenizer)
        for note in notes:
            # Every question comes after the template's tokens, which no repetition asks for.
            note[:, text.columns[:opening]] = float("inf")
        repeated = 0
        before: Sequence[Tensor | None] = [None] * len(notes)
        whole = fork(branch) if reconstruction.whole else None
        for chunk in chunks(reconstruction, ids, self._tokenizer, opening):
            cache = fork(branch) if whole is None else whole
            found = self._repeated(press, cache, chunk, text, before, repeated)
            if reconstruction.whole:
                repeated, before = repeated + chunk.ids.shape[1], found
                continue
            for note, one in zip(notes, found, strict=True):
                # Infinity stands for the template's tokens alone.
                note[:, text.columns[chunk.start : chunk.stop]] = one.clamp(max=_MOST)
        if reconstruction.whole:
            for note, one in zip(notes, before, strict=True):
                assert one is not None
                note[:] = one

    def _repeated(
        self,
        press: BasePress,
        cache: Cache,
        chunk: Chunk,
        text: _Text,
        before: Sequence[Tensor | None],
        repeated: int,
    ) -> list[Tensor]:
        """What a press makes of one forward that repeats a chunk behind a cache of one sequence.

        Args:
            press: who looks.
            cache: the cache, which is continued.
            chunk: what is repeated.
            text: what was read.
            before: what the press made of chunks before that this one goes on from, by layer.
            repeated: tokens of these.
        """
        self._capture.clear()
        reconstruction = press.needs.reconstruction
        assert reconstruction is not None
        length, device = chunk.ids.shape[1], text.columns.device
        seen = cache.get_seq_length() - repeated - text.n
        n_sink = max(reconstruction.n_sink, chunk.opening)
        sinks = text.columns[: min(n_sink, chunk.start)] + seen
        if seen:
            sinks = torch.arange(reconstruction.n_sink, device=device)
        own = text.columns[chunk.start : chunk.stop] - text.n
        last = chunk.stop == len(text.columns)
        inputs = {"input_ids": chunk.ids, cache_argument(self._decoder): cache, "use_cache": True}
        start, valid = cache.get_seq_length(), text.valid_after(repeated + length)
        if text.valid is not None and valid is not None:
            start = int(text.valid.sum()) + repeated
        rope = torch.arange(start, start + length, device=device)[None]
        if valid is not None:
            inputs |= {"attention_mask": valid.long(), "position_ids": rope}
        looks, layers = [], install_stores(cache, self._model)
        for depth, ((index, layer), made) in enumerate(zip(layers.items(), before, strict=True)):
            place = Place(index, depth, len(layers), rope)
            look = _Hook(press, place, self._capture, text, sinks, own, repeated, made, last)
            layer.hook, layer.reads_whole = look, True
            looks.append(look)
        if reconstruction.gradient:
            views = self._differentiated(inputs, looks)
            return [press.reconstructed(view) for view in views]
        self._decoder(**inputs)
        return [look.found for look in looks]

    def _differentiated(
        self, inputs: dict[str, object], looks: list[_Hook]
    ) -> list[ReconstructionView]:
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
                ids = cast(Tensor, inputs.pop("input_ids"))
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


def _first(output: object) -> Tensor:
    """The tensor that a module answers, alone or as the first of several."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore
