"""One forward of a pressed model: hooks are set on its cache layers, which are then compressed.

Whatever belongs to one forward is here, and gone when it ends, however it ends. Several threads may
each be in a forward of one model, also under one block.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from cachepress.cache.batch import note_text, trim
from cachepress.cache.codec import Codec
from cachepress.cache.layer import CompressedLayer
from cachepress.call import AttentionCall, Place
from cachepress.engine import Pending, compress, compress_together
from cachepress.errors import CachepressError, cache_dropped
from cachepress.hf.blocks import unobserved
from cachepress.hf.capture import Capture
from cachepress.hf.probe import check_continues
from cachepress.hf.reconstruction import Reconstructor, Waiting
from cachepress.hf.shifts import note_shift
from cachepress.hf.wiring import install_layers
from cachepress.measure import Stopwatch
from cachepress.press import BasePress
from cachepress.query_stats import QueryStats
from cachepress.schedules import Step


class Prompt(NamedTuple):
    """Token ids ``[B, n]`` of a prompt as far as it was read, and the text column after them."""

    ids: Tensor
    end: int


@dataclass(frozen=True)
class Setup:
    """What a block was entered with, which is the same in all of its forwards.

    Attributes:
        press: the press, ready for the model.
        model: the model.
        decoder: its text decoder.
        turns: "all" or "first", see ``PressSession``.
        codec: how kept pairs are stored; None to leave that to the layers.
        question: tokens at the end of the prompt that are the question, one number or one for each
            sequence; None if they are not known.
        tokenizer: the model's tokenizer, where the press asks the model in words.
        stopwatch: runs while layers are observed and compressed.
        capture: says what is captured of a forward.
        prompts: the prompts that are being read in chunks, by the cache that they go to.
    """

    press: BasePress
    model: PreTrainedModel
    decoder: PreTrainedModel
    turns: str
    codec: Codec | None
    question: Sequence[int] | None
    tokenizer: PreTrainedTokenizerBase | None
    stopwatch: Stopwatch | nullcontext[None]
    capture: Capture
    prompts: WeakKeyDictionary[Cache, Prompt]


@dataclass(frozen=True)
class _Hook:
    """Observes a layer in one forward of a pressed model, and compresses it if it is due.

    Attributes:
        forward: the forward.
        place: where in the model and in the text the layer is.
    """

    forward: "PressedForward"
    place: Place

    @property
    def features(self) -> Capture:
        """Captures what the press needs of the forward besides the call."""
        return self.forward.capture

    def observe(self, call: AttentionCall) -> None:
        """Add the call to the layer's query statistics, and compress the layer if it is due."""
        forward = self.forward
        with forward.setup.stopwatch:
            assert call.key is not None
            layer = call.key.layer
            query_stats = self._query_stats(layer)
            if forward.step.prompt:
                if forward.needs.observes:
                    query_stats.add(call)
            elif forward.needs.observes or not forward.due:
                query_stats.add_decoded(call, forward.needs.most_decoded)
            if forward.due:
                forward.compress_or_wait(Waiting(forward.press, layer, call, query_stats))

    def _query_stats(self, layer: CompressedLayer) -> QueryStats:
        """Return the layer's statistics so far, or new ones where a forward was not observed."""
        stats, step, needs = layer.query_stats, self.forward.step, self.forward.observed
        if stats is None or stats.needs != needs or stats.end != step.seen:
            stats = QueryStats(needs, step.seen)
        layer.query_stats, stats.end = stats, step.seen + step.new
        return stats


class PressedForward:
    """One forward of a model whose cache is compressed.

    Args:
        setup: what the block was entered with.
        cache: the cache that the forward continues.
        given: the arguments of the forward by name.
        ids: the token ids of the forward, ``[B, n]``; None where they are not known.
        chunk: for a forward that reads a chunk of a prompt: "hold" if layers are compressed only
            after the last one, "compress" if after each, "last" for the last one; else None.

    Attributes:
        step: the forward, as a schedule sees it.
        press: the press that acts in it.
        needs: what that press needs, found once for all layers.
        observed: the part of it that is observed.
        due: whether layers are compressed after it.
        capture: captures what the press needs of it.
    """

    def __init__(
        self,
        setup: Setup,
        cache: Cache,
        given: Mapping[str, object],
        ids: Tensor | None,
        chunk: str | None,
    ) -> None:
        self.setup, self._cache, self._tokens = setup, cache, tokens_of(given)
        self._given, self._ids, self._chunk = given, ids, chunk
        self._layers = install_layers(cache, setup.model)
        if len({layer.get_seq_length() for layer in self._layers.values()}) > 1:
            raise CachepressError(
                "the cache is that of a forward that did not end: its layers hold different "
                "texts; start again with a fresh cache"
            )
        self.step = self._step()
        if self.step.new > 1 and (self.step.seen or chunk == "hold"):
            check_continues(setup.model, cache)
        self.press = setup.press.acting(self.step)
        self.needs = self.press.needs
        self.observed = self.needs.observed
        self.due = chunk != "hold" and setup.press.schedule.due(self.step)
        schedule = setup.press.schedule
        observes = chunk == "hold" or (schedule.decodes and not self.step.prompt)
        self._is_observed = self.due or (self.needs.observes and observes)
        self.capture = setup.capture.anew() if self._is_observed else setup.capture
        self._reconstructor: Reconstructor | None = None
        self._pending: dict[BasePress, list[Pending]] = {}

    def run(self, call: Callable[[], object]) -> object:
        """Run the forward, and compress its cache; nothing is left behind, whatever is raised."""
        with unobserved(self.setup.decoder):
            try:
                self._instruct()
                with self.capture.hooked() if self._is_observed else nullcontext():
                    output = call()
                    self._check_filled()
                    with torch.inference_mode(False), torch.no_grad(), self.setup.stopwatch:
                        self._compress()
                return output
            finally:
                for layer in self._layers.values():
                    layer.hook, layer.reads_whole = None, False

    def compress_or_wait(self, layer: Waiting) -> None:
        """Compress a layer, or let it wait until the model reconstructed its context."""
        if self._reconstructor is not None and layer.press.needs.reconstruction is not None:
            self._reconstructor.wait(layer)
        else:
            self._compress_layer(layer)

    def _check_filled(self) -> None:
        """Raise UnsupportedError if the model did not fill the cache that it was given."""
        if next(iter(self._layers.values())).get_seq_length() == self.step.seen:
            raise cache_dropped()

    def _step(self) -> Step:
        n, seen = self._tokens.shape[1], self._cache.get_seq_length()
        since = seen + n - next(iter(self._layers.values())).scored_at
        prompt = n > 1 or self._chunk is not None
        later = prompt and self._chunk is None and seen > 0 and self.setup.turns == "first"
        return Step(seen, n, since, prompt, later)

    def _instruct(self) -> None:
        """Tell the layers how pairs are stored and read, and set hooks on them."""
        setup, step, layers = self.setup, self.step, list(self._layers.values())
        n_question = question_of(setup.question, self._tokens)
        if step.prompt and self.needs.reconstruction is not None:
            self._reconstructor = Reconstructor(
                *(setup.press, setup.model, setup.tokenizer, self.capture),
                *(self._cache, self._prompt_ids()),
            )
        instruct(layers, setup.press, setup.codec)
        for layer in layers:
            layer.reads_whole = self._chunk is not None
            if self._chunk == "compress" and setup.codec is not None:
                # Pairs that are compressed chunk by chunk would be quantized again and again.
                layer.codec = None
        if step.prompt and self._ids is not None:
            note_text(self._cache, self._ids, step.seen)
        if self._is_observed:
            rope = self._rope()
            for depth, (index, layer) in enumerate(self._layers.items()):
                place = Place(index, depth, len(layers), rope, n_question)
                layer.hook = _Hook(self, place)

    def _rope(self) -> Tensor:
        """Return the positions ``[B, n]`` that the tokens of the forward are rotated to."""
        (b, n), seen = self._tokens.shape[:2], self.step.seen
        rope = self._given.get("position_ids")
        if isinstance(rope, Tensor):
            # In image-text models a token of a picture has several positions, one for each section
            # of its keys. No single one is right: that is found out when keys are to be unrotated.
            sections = rope.reshape(-1, *rope.shape[-2:])
            if len(sections) == 1 or bool((sections == sections[0]).all()):
                return sections[0].expand(b, n)
        return torch.arange(seen, seen + n, device=self._tokens.device).expand(b, n)

    def _prompt_ids(self) -> Tensor:
        """Return the token ids of the prompt so far, which may have been read in chunks."""
        if self._ids is None:
            raise CachepressError(
                f"{self.setup.press!r} lets the model repeat its prompt: give input_ids, not "
                "embeddings or pictures"
            )
        ids, prompts = self._ids, self.setup.prompts
        before = prompts.pop(self._cache, None)
        # Chunks of a prompt whose reading was interrupted are not continued.
        if before is not None and before.end == self.step.seen:
            ids = torch.cat([before.ids, ids], dim=1)
        if self._chunk == "hold":
            prompts[self._cache] = Prompt(ids, self.step.seen + self.step.new)
        return ids

    def _compress(self) -> None:
        """Compress what waits for the end of the forward."""
        skipped = self.step.new if self.step.prompt and not self.due else 0
        for layer in self._layers.values():
            layer.mark_skipped(skipped, self.setup.press.schedule.bounded)
        if self._reconstructor is not None:
            for waiting in self._reconstructor.repeat():
                self._compress_layer(waiting)
        for press, layers in self._pending.items():
            compress_together(press, layers)
        if self.step.prompt:
            trim(self._cache)
            note_shift(self._cache, self._given, self.step.seen + self.step.new)

    def _compress_layer(self, layer: Waiting) -> None:
        pending = compress(*layer)
        layer.layer.mark_scored()
        if pending is not None:
            self._pending.setdefault(layer.press, []).append(pending)


def instruct(layers: Sequence[CompressedLayer], press: BasePress, codec: Codec | None) -> None:
    """Set the codec and the page budget that a press declares on the layers of a cache."""
    needs = press.needs
    for depth, layer in enumerate(layers):
        pages = needs.pages_read(depth)
        layer.codec = layer.codec if codec is None else codec
        layer.page_budget = layer.page_budget if pages is None else pages


def tokens_of(given: Mapping[str, object]) -> Tensor:
    """Return the token ids ``[B, n]`` of a forward's arguments, or embeddings ``[B, n, M]``."""
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor):
        raise CachepressError("the forward got neither input_ids nor inputs_embeds")
    return tokens


def question_of(question: Sequence[int] | None, batch: Tensor) -> Tensor | None:
    """Return the number of question tokens of each sequence of a batch; None if not given."""
    if question is None:
        return None
    b = batch.shape[0]
    if len(question) not in (1, b):
        raise CachepressError(
            f"question: got {len(question)} numbers for {b} sequences, wanted one or {b}"
        )
    return torch.tensor(question, device=batch.device).expand(b)
