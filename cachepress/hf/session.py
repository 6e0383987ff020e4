"""``with press(model)``: acts on the forwards of a model, and compresses the caches they fill.

A session stands around the forward of the model's text decoder for as long as a block is open, and
decides for each call whether a cache is compressed in it. What happens in one forward is in
``cachepress.hf.forward``; which block acts in which thread is in ``cachepress.hf.blocks``.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from threading import RLock
from types import TracebackType
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PretrainedConfig

from cachepress.cache.batch import compressed_layers
from cachepress.cache.codec import Codec
from cachepress.errors import CachepressError
from cachepress.hf.angles import as_one_forward
from cachepress.hf.around import Act, Around, Call, put_around, take_away
from cachepress.hf.attention import Selection
from cachepress.hf.blocks import Block, acting, enter, is_own, leave, tell
from cachepress.hf.capture import Capture
from cachepress.hf.chunks import tokenizer_for
from cachepress.hf.forward import PressedForward, Setup, tokens_of
from cachepress.hf.kinds import bring_kind_back, set_kind_aside
from cachepress.hf.probe import try_out
from cachepress.hf.wiring import (
    CACHE_NAMES,
    attach,
    cache_argument,
    check_model,
    n_compressed_layers,
    text_decoder,
    unwrapped,
)
from cachepress.measure import Stopwatch
from cachepress.press import BasePress

logger = logging.getLogger(__name__)
_IDS: ContextVar[Tensor | None] = ContextVar("cachepress_ids", default=None)
"""Token ids that the whole model was given, whose decoder may be given embeddings of them."""
_REACHED: ContextVar[list[bool] | None] = ContextVar("cachepress_reached", default=None)
"""Grows when the decoder's forward is called inside the forward of the whole model."""
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
"""Options of ``generate`` that let it try candidates, of which some are rejected."""
_END: ContextVar[int | None] = ContextVar("cachepress_end", default=None)
"""Text columns after the prompt that ``generate`` reads in chunks."""


class PressSession:
    """The context manager of ``with press(model)``: compresses the model's caches until exit.

    It acts in the thread or task that enters it and in what copies its context; entered by the main
    thread, also in threads that enter no block of their own. It may be entered again while it is
    open, and acts once. Of different blocks around each other the innermost acts.

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
        self._given, press = press, prepared(press, model)
        codec, asked = codec_of(press, storage), _question(press, question)
        self._setup = Setup(
            press=press,
            model=model,
            decoder=text_decoder(model),
            turns=turns,
            codec=codec,
            question=asked,
            tokenizer=tokenizer_for(press, model, tokenizer),
            stopwatch=nullcontext() if stopwatch is None else stopwatch,
            capture=Capture([press], model),
            prompts=WeakKeyDictionary(),
        )
        self.chunk: str | None = None
        self._blocks: list[Block] = []
        self._around: list[tuple[nn.Module, str, Around]] = []
        self._kind_is_aside, self._lock = False, RLock()
        self._selection: Selection | None = None

    def __enter__(self) -> None:
        block = Block(self._setup.decoder, self)
        with self._lock:
            try:
                if not self._blocks:
                    self._stand_around()
                self._blocks.append(block)
                enter(block)
                self._say_who_acts(block)
            except BaseException:  # Also an interrupt, after which nothing may stay.
                self._end(block)
                raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        block = None
        with self._lock:
            try:
                block = self._innermost()
                self._end(block)
            except BaseException:  # An interrupt comes once: what it left is done, and it goes on.
                self._end(self._innermost() if block is None else block)
                raise

    def _say_who_acts(self, block: Block) -> None:
        """Log where another press is open around this one, which does not act meanwhile."""
        own = repr(self._given)
        for outer in block.around:
            session = outer.session if outer.decoder is block.decoder else None
            if isinstance(session, PressSession) and (other := repr(session._given)) != own:
                _tell(own, other)

    def _innermost(self) -> Block:
        """Find the block that is left: an own one, where several threads or tasks are in one."""
        own = [block for block in self._blocks if is_own(block)]
        return (own or self._blocks)[-1]

    def _end(self, block: Block) -> None:
        """Close a block; after the last one the model has its own methods back."""
        leave(block)
        if block in self._blocks:
            self._blocks.remove(block)
        if self._blocks:
            return
        self._selection = None
        for module, name, around in self._around:
            take_away(module, name, around, self)
        self._around.clear()
        if self._kind_is_aside:
            self._kind_is_aside = False
            bring_kind_back(cast(PreTrainedModel, unwrapped(self._setup.model)))

    def _stand_around(self) -> None:
        """Put functions around the methods of the model whose calls have to be known."""
        model, decoder = unwrapped(self._setup.model), self._setup.decoder
        try_out(model)
        self._selection = attach(model)
        self._kind_is_aside = isinstance(model, PreTrainedModel) and set_kind_aside(model)
        acts: list[tuple[nn.Module, str, Act]] = [(decoder, "forward", _forward)]
        if model is not decoder:
            acts.append((model, "forward", _outer_forward))
        if hasattr(model, "generate"):
            acts.append((model, "generate", _generate))
        for module, name, act in acts:
            self._around.append((module, name, put_around(module, name, act, self)))

    def forward(self, call: Call) -> object:
        """Run a forward of the decoder, and compress its cache."""
        decoder, given = self._setup.decoder, call.named()
        cache = _cache_of(given)
        if cache is None and _uses_cache(given, decoder.config) and not _checkpoints(decoder):
            cache = DynamicCache(config=decoder.config)
            without = {name: x for name, x in given.items() if name not in CACHE_NAMES}
            call = call._replace(args=(), kwargs={**without, cache_argument(decoder): cache})
        if cache is None:
            return call.run()
        chunk = _chunk_of_generate(cache, given) if self.chunk is None else self.chunk
        ids = _ids_of(given, decoder)
        return PressedForward(self._setup, cache, given, ids, chunk).run(call.run)


@lru_cache
def _tell(inner: str, outer: str) -> None:
    """Log, once for each two presses, that the inner one acts alone."""
    logger.warning(
        f"{inner} is entered inside the block of {outer} on the same model and acts alone: for "
        f"both, one after the other, write ComposedPress([{outer}, {inner}])"
    )


def prepared(press: BasePress, model: PreTrainedModel) -> BasePress:
    """Make a press ready for a model.

    Raises:
        CachepressError: if the model cannot be compressed, or not by this press.
    """
    check_model(model)
    press = press.for_model(model)
    press.check_layers(n_compressed_layers(model))
    return press


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


def _forward(call: Call) -> object:
    """Let the session that acts here and now run a decoder's forward; no other one sees it."""
    if (reached := _REACHED.get()) is not None:
        reached.append(True)
    session = acting(call.module)
    if session is not None:
        return session.forward(call)
    cache = _cache_of(call.named())
    if cache is None or not compressed_layers(cache):
        tell(call.module)
    return call.run()


def _outer_forward(call: Call) -> object:
    """Remember the token ids that a whole model was given while its forward runs."""
    given = call.named()
    _cache_of(given)  # Two of them are refused.
    reached: list[bool] = []
    with _set(_IDS, cast(Tensor | None, given.get("input_ids"))), _set(_REACHED, reached):
        output = call.run()
    if not reached and acting(text_decoder(call.module)) is not None:
        raise CachepressError(
            f"the decoder's forward of this {type(call.module).__name__} was replaced while "
            "`with press(model)` is open, and nothing was compressed: enter the block again"
        )
    return output


def _generate(call: Call) -> object:
    """Remember where the prompt ends that ``generate`` reads in chunks (``prefill_chunk_size``).

    A forward cannot tell a chunk from a text of its own, and layers are compressed after the last.
    """
    decoder, given = text_decoder(call.module), call.kwargs
    pressed = acting(decoder) is not None
    if pressed and any(_options(call, name) for name in _ASSISTED):
        raise CachepressError(
            "assisted decoding inside `with press(model)` would compress candidates that are "
            "rejected afterwards: do assisted decoding after the block, on a cache that "
            "cachepress.prefill compressed"
        )
    names = ("attention_mask", "inputs", "input_ids", "inputs_embeds")
    texts = [given.get(name) for name in names] + list(call.args[:1])
    text = next((x for x in texts if isinstance(x, Tensor)), None)
    sizes = _options(call, "prefill_chunk_size")
    size = next((size for size in sizes if isinstance(size, int)), None)
    if text is None or size is None:
        with _set(_END, None):
            return call.run()
    cache, end = _cache_of(given), text.shape[1]
    first = (0 if cache is None else cache.get_seq_length()) + size - 1
    with _set(_END, end), as_one_forward(decoder, min(first, end - 1) if pressed else end, end - 1):
        return call.run()


def _options(call: Call, name: str) -> list[object]:
    """List the values that the arguments of ``generate`` and its configs give for an option."""
    own = getattr(call.module, "generation_config", None)
    configs = (call.kwargs.get("generation_config"), own)
    values = [call.kwargs.get(name), *(getattr(config, name, None) for config in configs)]
    return [value for value in values if value is not None]


def _chunk_of_generate(cache: Cache, given: Mapping[str, object]) -> str | None:
    """Tell whether a forward reads a chunk of a prompt that ``generate`` reads, and the last."""
    end, seen = _END.get(), cache.get_seq_length()
    if end is None or seen >= end:
        return None
    return "hold" if seen + tokens_of(given).shape[1] < end else "last"


def _ids_of(given: Mapping[str, object], decoder: PreTrainedModel) -> Tensor | None:
    """Return the token ids of a decoder's forward; None where some of it is no token.

    A model may give its decoder embeddings. They stand for the tokens that the model itself was
    given if they are those tokens' embeddings, and not for instance a picture's.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return ids
    ids = _IDS.get()
    if ids is None or not isinstance(embeds, Tensor) or ids.shape != embeds.shape[:2]:
        return None
    with torch.no_grad():
        own = cast(Tensor, decoder.get_input_embeddings()(ids))
    return ids if torch.equal(own, embeds.detach()) else None


@contextmanager
def _set(variable: ContextVar, value: object) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _cache_of(given: Mapping[str, object]) -> Cache | None:
    found = [x for name in CACHE_NAMES if (x := given.get(name)) is not None]
    if len(found) > 1 and found[0] is not found[1]:
        raise CachepressError(f"got two caches, as {' and as '.join(CACHE_NAMES)}: give one")
    return cast(Cache, found[0]) if found else None


def _checkpoints(decoder: PreTrainedModel) -> bool:
    """Tell whether layers are checkpointed, which transformers does without a cache."""
    return decoder.training and decoder.is_gradient_checkpointing


def _uses_cache(given: Mapping[str, object], config: PretrainedConfig) -> bool:
    wanted = given.get("use_cache")
    return bool(getattr(config, "use_cache", True) if wanted is None else wanted)
