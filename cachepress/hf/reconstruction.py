"""Lets a model repeat its context, and gives a press what each layer attended to for that (KVzip).

After a prompt was read, the model is asked to repeat it, in chunks, behind a fork of the cache that
still holds every pair. What the press computes from these forwards is the hidden feature that it
scores pairs by. The forwards themselves are never compressed.
"""

from collections.abc import Iterator, Sequence
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
from cachepress.hf.angles import rotary_state_kept
from cachepress.hf.capture import Capture
from cachepress.hf.chunks import Chunk, chunks, opening_of
from cachepress.hf.hooks import Hooks
from cachepress.hf.wiring import (
    attention_modules,
    cache_argument,
    install_layers,
    last_layer,
    text_decoder,
)
from cachepress.ops import wide, wide_dtype, without_autocast
from cachepress.press import BasePress
from cachepress.query_stats import QueryStats
from cachepress.reconstruction import Reconstruction, ReconstructionView

_T = TypeVar("_T")
_MOST = torch.finfo(torch.float32).max


class Waiting(NamedTuple):
    """A layer that is to be compressed, and what its press will be given of it."""

    press: BasePress
    layer: CompressedLayer
    call: AttentionCall
    query_stats: QueryStats


class _Text(NamedTuple):
    """The text of one sequence that is repeated, and where it is in the cache.

    Attributes:
        columns: where its tokens are among the last ``n`` text columns.
        n: text columns of the prompt, padding included.
        valid: ``[1, S]`` bool, which text columns are tokens; None when all are.
    """

    columns: Tensor
    n: int
    valid: Tensor | None

    def valid_after(self, repeated: int) -> Tensor | None:
        """Tell which text columns are tokens when ``repeated`` tokens have followed them."""
        return None if self.valid is None else F.pad(self.valid, (0, repeated), value=True)


@dataclass
class _Hook:
    """Observes one layer of a forward that repeats a chunk.

    Attributes:
        press: the press that declared the reconstruction.
        place: where in the model and in the text the layer is.
        features: captures what the press needs of the forward besides the call.
        text: the text that is repeated.
        sinks: where the pairs of the beginning of the text are.
        chunk: where the chunk is, counted back from the first token that repeats it.
        repeated: tokens that repeated chunks in forwards before.
        before: what the press computed of these.
        last: whether no chunk follows.
        view: what the press is given, where it waits for gradients.
        found: what the press computed of it, where it does not.
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

    def observe(self, call: AttentionCall) -> None:
        """Give the press the pairs and queries of a layer."""
        query, weighs = call.query, self._reconstruction.weighs
        h, n = call.pairs.keys.shape[1], query.shape[2]
        keys, values, valid, chunk = (
            self._whole(call, n) if self._reconstruction.whole else self._part(call, n)
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
        if self._reconstruction.gradient:
            self.view = view
        else:
            # At once, so that copies of one layer's pairs only are held.
            self.found = self.press.reconstructed(view)

    @property
    def _reconstruction(self) -> Reconstruction:
        reconstruction = self.press.needs.reconstruction
        assert reconstruction is not None
        return reconstruction

    def _part(self, call: AttentionCall, n: int) -> tuple[Tensor, Tensor, Tensor, slice]:
        """Pick keys, values and validity of the sinks, the chunk and the tokens that repeat it.

        The slice says where the chunk is among them. Nothing was evicted of the chunk yet, so that
        its pairs stand at the same place in every head.
        """
        pairs, t = call.pairs, call.pairs.keys.shape[2]
        own = torch.arange(t - n, t, device=call.query.device)
        index = torch.cat([self.sinks.to(own), self.chunk.to(own) + t - n, own])
        keys, values = (x[:, :, index].detach() for x in (pairs.keys, pairs.values))
        chunk = slice(len(self.sinks), len(self.sinks) + len(self.chunk))
        return keys, values, pairs.text_positions()[:, :, index] >= 0, chunk

    def _whole(self, call: AttentionCall, n: int) -> tuple[Tensor, Tensor, Tensor, slice]:
        """Give keys, values and validity of all pairs; the slice says where the text is."""
        pairs, positions = call.pairs, call.pairs.text_positions()
        valid, text = positions >= 0, self.text.valid_after(self.repeated + n)
        if text is not None:
            column = positions.clamp(min=0).long().flatten(1)
            valid = valid & text.to(column.device).gather(1, column).view_as(valid)
        stop = positions.shape[-1] - n - self.repeated
        chunk = slice(stop - self.text.n, stop)
        return pairs.keys.detach(), pairs.values.detach(), valid, chunk


class Reconstructor:
    """Lets a model repeat the prompt that a cache was filled with.

    Args:
        press: the press that declared the reconstruction.
        model: the model.
        tokenizer: its tokenizer, if the press asks in words.
        capture: captures what the press needs of a forward.
        cache: the cache, of which nothing of the prompt was evicted yet.
        ids: the token ids of the prompt, ``[B, n]``.
    """

    def __init__(
        self,
        press: BasePress,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        capture: Capture,
        cache: Cache,
        ids: Tensor,
    ) -> None:
        self._press, self._model, self._decoder = press, model, text_decoder(model)
        self._tokenizer, self._capture = tokenizer, capture
        self._cache, self._ids = cache, ids
        self._layers: list[Waiting] = []

    def wait(self, layer: Waiting) -> None:
        """Let a layer wait to be compressed until the forward is done."""
        needs = layer.press.needs
        call = layer.call.when_over(needs.rotates, needs.projection)
        self._layers.append(layer._replace(call=call))

    def repeat(self) -> Iterator[Waiting]:
        """Let the model repeat its context, and give the waiting layers with their hidden feature.

        One after the other: a layer's pairs are laid out when it is asked for.
        """
        if self._layers:
            self._repeat()
        while self._layers:
            layer = self._layers.pop(0)
            call = replace(layer.call, read=layer.layer.snapshot.rows())
            yield layer._replace(call=call)

    def _repeat(self) -> None:
        layers, cache, ids = self._layers, self._cache, self._ids
        reconstruction, valid = layers[0].press.needs.reconstruction, layers[0].call.text_valid
        assert reconstruction is not None
        b, n = ids.shape
        features = [
            layer.call.query.new_zeros(
                b, layer.layer.lengths.shape[1], n, dtype=wide_dtype(layer.call.query)
            )
            for layer in layers
        ]
        for i in range(b):
            branch = fork(cache)
            if b > 1:
                only = torch.tensor([i], device=ids.device)
                branch.reorder_cache(cast(torch.LongTensor, only))
            columns = torch.arange(n, device=ids.device)
            if valid is not None:
                columns = valid[i, -n:].nonzero()[:, 0].to(ids.device)
            if len(columns):
                text = _Text(columns, n, None if valid is None else valid[i : i + 1])
                own = ids[i : i + 1, columns]
                with rotary_state_kept(self._decoder):
                    self._repeat_one(branch, own, text, [feature[i] for feature in features])
        for layer, feature in zip(layers, features, strict=True):
            layer.query_stats.set_hidden_feature(feature)

    def _repeat_one(self, branch: Cache, ids: Tensor, text: _Text, features: list[Tensor]) -> None:
        """Let the model repeat one sequence ``ids [1, T]``; fill each layer's ``[H, n]``."""
        press = self._layers[0].press
        reconstruction = press.needs.reconstruction
        assert reconstruction is not None
        opening = 0
        if reconstruction.speaks and branch.get_seq_length() == text.n:
            opening = opening_of(ids, self._tokenizer)
        for feature in features:
            # Every question comes after the template's tokens, which nobody asks to be repeated.
            feature[:, text.columns[:opening].to(feature.device)] = float("inf")
        repeated = 0
        before: Sequence[Tensor | None] = [None] * len(features)
        whole = fork(branch) if reconstruction.whole else None
        for chunk in chunks(reconstruction, ids, self._tokenizer, opening):
            cache = fork(branch) if whole is None else whole
            found = self._repeat_chunk(press, cache, chunk, text, before, repeated)
            if reconstruction.whole:
                repeated, before = repeated + chunk.ids.shape[1], found
                continue
            for feature, one in zip(features, found, strict=True):
                # Infinity stands for the template's tokens alone.
                own = text.columns[chunk.start : chunk.stop].to(feature.device)
                feature[:, own] = one.clamp(max=_MOST)
        if reconstruction.whole:
            for feature, one in zip(features, before, strict=True):
                assert one is not None
                feature[:] = one

    def _repeat_chunk(
        self,
        press: BasePress,
        cache: Cache,
        chunk: Chunk,
        text: _Text,
        before: Sequence[Tensor | None],
        repeated: int,
    ) -> list[Tensor]:
        """Run a forward that repeats a chunk, and return what the press computes of each layer.

        Args:
            press: the press that declared the reconstruction.
            cache: a cache of one sequence, which is continued.
            chunk: the chunk, and the token ids that repeat it.
            text: the text that it is a part of.
            before: what the press computed of chunks before that this one goes on from, by layer.
            repeated: number of tokens that repeated these.
        """
        self._capture.clear()
        reconstruction = press.needs.reconstruction
        assert reconstruction is not None
        length, device = chunk.ids.shape[1], text.columns.device
        seen = cache.get_seq_length() - repeated - text.n
        n_sink = max(reconstruction.n_sink, chunk.opening)
        sinks = text.columns[: min(n_sink, chunk.start)] + seen
        if seen:
            # Of an earlier prompt each head holds what it kept: its first pairs are the sinks.
            sinks = torch.arange(reconstruction.n_sink, device=device)
        own = text.columns[chunk.start : chunk.stop] - text.n
        last = chunk.stop == len(text.columns)
        inputs = {"input_ids": chunk.ids, cache_argument(self._decoder): cache, "use_cache": True}
        start, valid = cache.get_seq_length(), text.valid_after(repeated + length)
        if text.valid is not None and valid is not None:
            start = int(text.valid.sum()) + repeated
        # Of a padded text positions go on from its last token, and not from its last column.
        rope = torch.arange(start, start + length, device=device)[None]
        if valid is not None:
            inputs |= {"attention_mask": valid.long(), "position_ids": rope}
        hooks, layers = [], install_layers(cache, self._model)
        for depth, ((index, layer), made) in enumerate(zip(layers.items(), before, strict=True)):
            place = Place(index, depth, len(layers), rope)
            hook = _Hook(press, place, self._capture, text, sinks, own, repeated, made, last)
            layer.hook, layer.reads_whole = hook, True
            hooks.append(hook)
        if reconstruction.gradient:
            views = self._differentiated(inputs, hooks)
            with without_autocast(device):
                return [press.reconstructed(view) for view in views]
        self._decoder(**inputs)
        return [hook.found for hook in hooks]

    def _differentiated(
        self, inputs: dict[str, object], hooks: list[_Hook]
    ) -> list[ReconstructionView]:
        """Run a forward that repeats a chunk, and add gradient norms to what the hooks observed.

        Differentiated is the sum of squares of the last hidden states, by the attention outputs.
        """
        added: dict[nn.Module, Tensor] = {}
        last: list[Tensor] = []
        weights = [p for p in self._model.parameters() if p.requires_grad]
        try:
            for weight in weights:
                weight.requires_grad_(False)
            with torch.inference_mode(False), torch.enable_grad(), Hooks() as heard:
                for module in attention_modules(self._decoder):
                    heard.after(module, lambda m, _, out: added.__setitem__(m, _first(out)))
                layer = last_layer(self._decoder)
                heard.after(layer, lambda m, _, out: last.append(_first(out)))
                ids = cast(Tensor, inputs.pop("input_ids"))
                embeds = self._decoder.get_input_embeddings()(ids.clone())
                self._decoder(**inputs, inputs_embeds=embeds.detach().requires_grad_())
                outputs = [added[hook.module] for hook in hooks]
                gradients = torch.autograd.grad(wide(last[0]).square().sum(), outputs)
        finally:
            for weight in weights:
                weight.requires_grad_(True)
        norms = [wide(gradient).norm(dim=-1) for gradient in gradients]
        return [replace(hook.view, gradient=x) for hook, x in zip(hooks, norms, strict=True)]


def _first(output: object) -> Tensor:
    """Return the tensor that a module computes, alone or as the first of several."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore
