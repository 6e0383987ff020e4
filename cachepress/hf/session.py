"""``with press(model)``: observes the forwards of a model, and compresses its layers.

A session decides, by the press's schedule, in which forwards layers are observed and compressed,
and sets a hook on each cache layer that does it. How the attention function reaches that hook is in
``cachepress.hf.attention``; how a layer is compressed is in ``cachepress.engine``.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PretrainedConfig

from cachepress.cache.batch import note_text, trim
from cachepress.cache.codec import Codec
from cachepress.cache.layer import CompressedLayer
from cachepress.call import AttentionCall, Place
from cachepress.engine import Pending, compress, compress_together
from cachepress.errors import CachepressError
from cachepress.hf.attention import attach
from cachepress.hf.capture import Capture
from cachepress.hf.chunks import tokenizer_of
from cachepress.hf.kinds import bring_kind_back, set_kind_aside
from cachepress.hf.reconstruction import Reconstructor, Waiting
from cachepress.hf.wiring import (
    CACHE_NAMES,
    cache_argument,
    check_model,
    install_layers,
    n_compressed_layers,
    text_decoder,
)
from cachepress.measure import Stopwatch
from cachepress.press import BasePress
from cachepress.query_stats import QueryStats
from cachepress.schedules import Step
from cachepress.view import Needs

_ACTIVE: list["PressSession"] = []


@dataclass(frozen=True)
class _Hook:
    """Observes a layer in one forward of a pressed model, and compresses it if it is due.

    Attributes:
        session: the session that the forward belongs to.
        press: the press that acts in it.
        needs: what that press needs, found once for all layers.
        observed: the part of it that is observed.
        place: where in the model and in the text the layer is.
        step: the forward, as a schedule sees it.
        due: whether the layer is compressed after it.
    """

    session: "PressSession"
    press: BasePress
    needs: Needs
    observed: Needs
    place: Place
    step: Step
    due: bool

    differentiates = False

    @property
    def features(self) -> Capture:
        """Captures what the press needs of the forward besides the call."""
        return self.session.capture

    def observe(self, call: AttentionCall) -> None:
        """Add the call to the layer's query statistics, and compress the layer if it is due."""
        with self.session.stopwatch:
            self._observe(call)

    def _observe(self, call: AttentionCall) -> None:
        assert call.key is not None
        layer = call.key.layer
        query_stats = self._query_stats(layer)
        if self.step.prompt:
            if self.needs.observes:
                query_stats.add(call)
        elif self.needs.observes or not self.due:
            query_stats.add_decoded(call, self.needs.most_decoded)
        if self.due:
            self.session.compress(Waiting(self.press, layer, call, query_stats), self.step)

    def _query_stats(self, layer: CompressedLayer) -> QueryStats:
        """Return the layer's statistics so far, or new ones where a forward was not observed."""
        stats, step = layer.query_stats, self.step
        if stats is None or stats.needs != self.observed or stats.end != step.seen:
            stats = QueryStats(self.observed, step.seen)
        layer.query_stats, stats.end = stats, step.seen + step.new
        return stats


class PressSession:
    """The context manager of ``with press(model)``: compresses the model's caches until exit.

    Args:
        press: the press.
        model: a transformers decoder model.
        turns: "all" compresses after every forward of several tokens, "first" only after the first
            of a text.
        storage: "full", "int8", "int4", "int2", or a Codec.
        question: number of tokens at the end of the prompt that are the question, one number or
            one for each sequence; for presses that need it.
        tokenizer: the model's tokenizer, for presses that reconstruct the context; None to load the
            one that was saved with the model.
        stopwatch: runs while layers are observed and compressed.

    Attributes:
        chunk: for forwards that are chunks of one prompt: "hold" if layers are compressed only
            after the last one, "compress" if after each, "last" for the last one; else None.
        capture: captures what the press needs of a forward.

    Raises:
        UnsupportedError: if the model cannot be compressed.
    """

    def __init__(
        self,
        press: BasePress,
        model: PreTrainedModel,
        turns: str = "all",
        storage: str | Codec = "full",
        question: int | Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        if turns not in ("all", "first"):
            raise CachepressError(f'turns: got {turns!r}, wanted "all" or "first"')
        press = prepared(press, model)
        self._press, self._model, self._turns = press, model, turns
        self._config = text_decoder(model).config
        self._codec = codec_of(press, storage)
        self._question = _question(press, question)
        if (
            press.needs.reconstruction is not None
            and press.needs.reconstruction.speaks
            and tokenizer is None
        ):
            tokenizer = tokenizer_of(model)
        self.chunk: str | None = None
        self.capture = Capture([press], model)
        self._reconstructor = Reconstructor(press, model, tokenizer, self.capture)
        self._pending: dict[BasePress, list[Pending]] = {}
        self._layers: list[CompressedLayer] = []
        self._read: Cache | None = None
        self._covered = {m for m in model.modules() if isinstance(m, PreTrainedModel)}
        self._hooks: list[RemovableHandle] = []
        self._depth = self._skipped = 0
        self._kind_is_aside = False
        self.stopwatch = nullcontext() if stopwatch is None else stopwatch

    def __enter__(self) -> None:
        attach(self._model)
        self._kind_is_aside = set_kind_aside(self._model)
        for module in self._covered:
            self._hooks += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, always_call=True),
            ]
        self._hooks += self.capture.hook()
        _ACTIVE.append(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _ACTIVE.remove(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._kind_is_aside:
            bring_kind_back(self._model)
        self._end_forward()

    def question_of(self, batch: Tensor) -> Tensor | None:
        """Return the number of question tokens of each sequence, ``[B]``; None if not given."""
        if self._question is None:
            return None
        b = batch.shape[0]
        if len(self._question) not in (1, b):
            raise CachepressError(
                f"question: got {len(self._question)} numbers for {b} sequences, wanted one or {b}"
            )
        return torch.tensor(self._question, device=batch.device).expand(b)

    def compress(self, layer: Waiting, step: Step) -> None:
        """Compress a layer, or let it wait until the model reconstructed its context."""
        if layer.press.needs.reconstruction is not None and step.prompt:
            self._reconstructor.wait(layer)
        else:
            self._compress(layer)

    def _compress(self, layer: Waiting) -> None:
        pending = compress(*layer)
        layer.layer.mark_scored()
        if pending is not None:
            self._pending.setdefault(layer.press, []).append(pending)

    def _before(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        # Of nested sessions the innermost one acts; of nested modules only the outermost forward.
        later = _ACTIVE[_ACTIVE.index(self) + 1 :]
        if self._depth or any(module in other._covered for other in later):
            self._depth += 1
            return None
        given = {
            **dict(zip(inspect.signature(module.forward).parameters, args, strict=False)),
            **kwargs,
        }
        cache, added = _cache_of(given), {}
        if cache is None and _uses_cache(given, self._config):
            cache = DynamicCache(config=self._config)
            added[cache_argument(module)] = cache
        if cache is not None:
            self._begin_forward(cache, given)
        self._depth += 1
        return (args, {**_without_cache(kwargs), **added}) if added else None

    def _begin_forward(self, cache: Cache, given: Mapping[str, object]) -> None:
        layers = install_layers(cache, self._model)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            raise CachepressError("the forward got neither input_ids nor inputs_embeds")
        b, n = tokens.shape[:2]
        n_question = self.question_of(tokens)
        seen = cache.get_seq_length()
        since = seen + n - next(iter(layers.values())).scored_at
        prompt = n > 1 or self.chunk is not None
        later = prompt and self.chunk is None and seen > 0 and self._turns == "first"
        step = Step(seen, n, since, prompt, later)
        press = self._press.acting(step)
        needs = press.needs
        due = self.chunk != "hold" and self._press.schedule.due(step)
        self._skipped = n if step.prompt and not due else 0
        self._read = cache if step.prompt else None
        if needs.reconstruction is not None and step.prompt:
            self._reconstructor.read(cache, given.get("input_ids"))
        self._prepare(layers)
        ids = given.get("input_ids")
        if step.prompt and self.chunk is None and isinstance(ids, Tensor):
            note_text(cache, ids, seen)
        if not due and not (needs.observes and self._observes(step)):
            return
        rope = given.get("position_ids")
        if not isinstance(rope, Tensor):
            rope = torch.arange(seen, seen + n, device=tokens.device).unsqueeze(0)
        # In image-text models a token has several positions; the first one rises with the text.
        rope = rope.reshape(-1, *rope.shape[-2:])[0].expand(b, n)
        observed = needs.observed
        for depth, (index, layer) in enumerate(layers.items()):
            place = Place(index, depth, len(layers), rope, n_question)
            layer.hook = _Hook(self, press, needs, observed, place, step, due)

    def _prepare(self, layers: Mapping[int, CompressedLayer]) -> None:
        """Tell the layers of a forward how pairs are stored and read."""
        self._layers = list(layers.values())
        instruct(self._layers, self._press, self._codec)
        if self.chunk is not None:
            for layer in self._layers:
                layer.reads_whole = True
        if self.chunk == "compress" and self._codec is not None:
            for layer in self._layers:
                # Pairs that are compressed chunk by chunk would be quantized again and again.
                layer.codec = None

    def _observes(self, step: Step) -> bool:
        """Tell whether a forward that compresses nothing is observed for a later one that does."""
        return self.chunk == "hold" or (self._press.schedule.decodes and not step.prompt)

    def _after(self, module: nn.Module, args: object, output: object) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        if output is not None:
            with torch.inference_mode(False), torch.no_grad(), self.stopwatch:
                for layer in self._layers:
                    layer.mark_skipped(self._skipped, self._press.schedule.bounded)
                for waiting in self._reconstruct():
                    self._compress(waiting)
                for press, layers in self._pending.items():
                    compress_together(press, layers)
                if self._read is not None:
                    trim(self._read)
        self._end_forward()

    def _reconstruct(self) -> list[Waiting]:
        """Reconstruct the context for the layers that wait for it, and return them."""
        # The forwards that repeat the context are not for the press: they count as inner ones.
        self._depth += 1
        try:
            return self._reconstructor.repeat()
        finally:
            self._depth -= 1

    def _end_forward(self) -> None:
        self.capture.clear()
        self._pending.clear()
        self._reconstructor.clear(ids=self.chunk != "hold")
        for layer in self._layers:
            layer.hook, layer.reads_whole = None, False
        self._layers.clear()
        self._read = None


def prepared(press: BasePress, model: PreTrainedModel) -> BasePress:
    """Make a press ready for a model.

    Raises:
        CachepressError: if the model cannot be compressed, or not by this press.
    """
    check_model(model)
    press = press.for_model(model)
    press.check_layers(n_compressed_layers(model))
    return press


def instruct(layers: Sequence[CompressedLayer], press: BasePress, codec: Codec | None) -> None:
    """Set the codec and the page budget that a press declares on the layers of a cache."""
    needs = press.needs
    for depth, layer in enumerate(layers):
        pages = needs.pages_read(depth)
        layer.codec = layer.codec if codec is None else codec
        layer.page_budget = layer.page_budget if pages is None else pages


def codec_of(press: BasePress, storage: str | Codec) -> Codec | None:
    """Return the codec of kept pairs, which either the press declares or the call gives.

    Raises:
        CachepressError: if both do.
    """
    given, own = Codec.of(storage), press.needs.storage
    if given is not None and own is not None:
        raise CachepressError(
            f"{press!r} says how pairs are stored: got storage={storage!r} besides, leave it out"
        )
    return own if given is None else given


def _question(press: BasePress, question: int | Sequence[int] | None) -> list[int] | None:
    """Check the number of question tokens, one for each sequence or one for all."""
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


def _cache_of(given: Mapping[str, object]) -> Cache | None:
    found = (given.get(name) for name in CACHE_NAMES)
    return cast(Cache | None, next((x for x in found if x is not None), None))


def _without_cache(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in kwargs.items() if key not in CACHE_NAMES}


def _uses_cache(given: Mapping[str, object], config: PretrainedConfig) -> bool:
    wanted = given.get("use_cache")
    return bool(getattr(config, "use_cache", True) if wanted is None else wanted)
