"""One context, many questions: prefill once, compress, answer all from the compressed cache."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Pipeline,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.pipelines import PIPELINE_REGISTRY

from cachepress.cache.batch import CacheSize, fork, size_of, text_of
from cachepress.cache.codec import Codec
from cachepress.decode import check_generation, generate
from cachepress.errors import CachepressError
from cachepress.generation.prefill import prefill
from cachepress.hf import has_only_full_attention
from cachepress.limits import MOST_TOKENS, check_whole
from cachepress.models.chat import encode, template
from cachepress.ops import wait
from cachepress.presses import BasePress

TASK = "kv-press-text-generation"
MIDDLE, END = "middle", "end"
"""Where a context that is too long is cut."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptOptions:
    """How a context and its questions become token ids.

    Attributes:
        question: one question; exclusive with ``questions``.
        questions: several questions on the same context.
        answer_prefix: how answers begin, one text or one for each question; it is not part of
            the answer.
        max_new_tokens: most tokens of an answer, one number or one for each question.
        max_context_length: most tokens of a context; None for what the model has room for.
        truncation: where a longer context is cut instead of being refused: "middle" keeps as many
            tokens of the beginning as of the end of the whole prompt, which the shortest question
            belongs to, "end" (or True) those of the context's beginning.
        separator: text that stands where the context was cut.
        suffix: what the context ends with, such as a question that a press is to see; it is
            tokenised apart, as questions are, and a cut spares it.
        enable_thinking: passed to the chat template.
        chat: whether context and questions are put into the model's chat template, if it has one.
        beyond_trained_length: allow contexts that are longer than the model was trained for; what
            it answers there is not to be trusted.
        forced: a text for each question that the model is to be made to say in place of an answer,
            for which there has to be room as well; it is not part of the prompt.
    """

    question: str | None = None
    questions: Sequence[str] | None = None
    answer_prefix: str | Sequence[str] = ""
    max_new_tokens: int | Sequence[int] = 50
    max_context_length: int | None = None
    truncation: bool | str = False
    separator: str = ""
    suffix: str = ""
    enable_thinking: bool = False
    chat: bool = True
    beyond_trained_length: bool = False
    forced: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.question is not None and self.questions is not None:
            raise CachepressError("got both question and questions: give one of them")
        if isinstance(self.questions, str) or not self.asked:
            raise CachepressError(f"questions: got {self.questions!r}, wanted a list of texts")
        for name, given in (("max_new_tokens", self.limits), ("answer_prefix", self.prefixes)):
            if len(given) != len(self.asked):
                raise CachepressError(f"{name}: got {len(given)} for {len(self.asked)} questions")
        if self.truncation not in (False, True, MIDDLE, END):
            raise CachepressError(
                f"truncation: got {self.truncation!r}, wanted {MIDDLE!r}, {END!r}, True for "
                f"{END!r}, or False to refuse what is too long"
            )
        for n in self.limits:
            check_whole("max_new_tokens", n)
        if self.max_context_length is not None:
            check_whole("max_context_length", self.max_context_length, most=MOST_TOKENS)

    @property
    def asked(self) -> list[str]:
        """The questions, one or many."""
        return [self.question or ""] if self.questions is None else list(self.questions)

    @property
    def limits(self) -> list[int]:
        """Most new tokens of each answer."""
        if isinstance(self.max_new_tokens, int):
            return [self.max_new_tokens] * len(self.asked)
        return list(self.max_new_tokens)

    @property
    def prefixes(self) -> list[str]:
        """The beginning of each answer."""
        if isinstance(self.answer_prefix, str):
            return [self.answer_prefix] * len(self.asked)
        return list(self.answer_prefix)


@dataclass(frozen=True)
class Prompt:
    """Token ids of a context and its questions.

    Attributes:
        context_ids: ``[1, T]``.
        question_ids: ``[1, q]`` for each question: all that follows the context.
        cut: tokens of the context that were cut.
    """

    context_ids: Tensor
    question_ids: list[Tensor]
    cut: int = 0


@dataclass(frozen=True)
class Answers:
    """Answers from one compressed cache, and what they cost.

    Attributes:
        texts: one answer a question.
        context_tokens: tokens of the context, the chat template's part included.
        cut_tokens: tokens of it that were cut, as it was too long.
        cache: what the cache saw and holds after compression, before the first question; under a
            press that looks at the question, what the last one's cache does.
        prefill_seconds: time of the context's forward, compression included; 0 if it was reused.
            Under a press that looks at the question, of all forwards, one for each question.
        decode_seconds: time of all questions and answers.
        tokens: the answers as token ids, without what ended them.
    """

    texts: list[str]
    context_tokens: int
    cache: CacheSize
    prefill_seconds: float
    decode_seconds: float
    tokens: list[list[int]]
    cut_tokens: int = 0

    @property
    def decode_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.tokens))


@dataclass(frozen=True)
class _Reading:
    """A prompt that is read at once, and what is asked on it.

    Attributes:
        ids: ``[1, T]``.
        question: tokens at its end that are the question; None where the press does not ask.
        question_ids: what follows, for each answer.
        limits: most new tokens of each answer.
    """

    ids: Tensor
    question: int | None
    question_ids: list[Tensor]
    limits: list[int]


class KVPressTextGenerationPipeline(Pipeline):
    """``pipeline("kv-press-text-generation", model=..., tokenizer=...)``.

    ``pipe(context, questions=[...], press=press)`` gives ``{"answers": [...]}``, and with
    ``question="..."`` ``{"answer": "..."}``; a list of contexts gives a list of these. Options of
    a call: those of ``PromptOptions``; ``press``; ``cache``, an empty ``DynamicCache()`` to keep
    the compressed context in, or one that holds it already; ``prefill_chunk_size``,
    ``prefill_mode`` and ``storage``, see ``cachepress.prefill``; ``return_stats`` to get the
    ``Answers`` under "stats"; and every option of transformers' ``GenerationConfig``. Answers are
    greedy unless ``do_sample=True``.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __call__(self, inputs: str | list[str], **options: object) -> dict | list[dict]:
        """Answer questions on one context, or on each of a list of contexts."""
        questions = options.get("questions")
        nested = isinstance(questions, list | tuple) and not all(
            isinstance(question, str) for question in questions
        )
        if not nested:
            return cast(dict | list[dict], super().__call__(inputs, **options))
        assert isinstance(questions, list | tuple)
        if isinstance(inputs, str) or len(questions) != len(inputs):
            raise CachepressError(
                f"questions: got {len(questions)} lists of questions, wanted one list for each "
                "context of a list of contexts"
            )
        each = zip(inputs, questions, strict=True)
        answered = [self(context, **{**options, "questions": asked}) for context, asked in each]
        return cast(list[dict], answered)

    def _sanitize_parameters(self, **options: object) -> tuple[dict, dict, dict]:
        known = {field.name for field in fields(PromptOptions)}
        prompt: dict[str, Any] = {name: options.pop(name) for name in known & options.keys()}
        names = ("press", "cache", "prefill_chunk_size", "prefill_mode", "storage")
        run = {name: options.pop(name) for name in names if name in options}
        post = {name: options.pop(name) for name in ("return_stats",) if name in options}
        unknown = options.keys() - GenerationConfig().to_dict().keys()
        if unknown:
            raise CachepressError(
                f"unknown option {sorted(unknown)[0]!r}: wanted {', '.join(sorted(known))}, "
                f"{', '.join(names)}, return_stats, or an option of GenerationConfig"
            )
        if options:
            check_generation(options)
            run["generation"] = options
        preprocess = {"options": PromptOptions(**prompt)} if prompt else {}
        return preprocess, run, post

    def preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_: str, options: PromptOptions | None = None
    ) -> dict:
        """Token ids of the context apart from its questions."""
        options = options or PromptOptions()
        prompt = make_prompt(self._tokenizer, self.model, input_, options)
        if prompt.cut:
            n = prompt.context_ids.shape[1]
            place = "the middle" if options.truncation == MIDDLE else "the end"
            whole = n + prompt.cut - encode(self._tokenizer, options.separator, False).shape[1]
            logger.warning("context cut from %d to %d tokens: %s is gone", whole, n, place)
        return {"prompt": prompt, "options": options}

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        assert self.tokenizer is not None
        return self.tokenizer

    def _forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_tensors: dict,
        press: BasePress | None = None,
        cache: Cache | None = None,
        prefill_chunk_size: int | None = None,
        prefill_mode: str = "exact",
        storage: str | Codec = "full",
        generation: Mapping[str, object] | None = None,
    ) -> dict:
        prompt, options = input_tensors["prompt"], input_tensors["options"]
        tokens: list[list[int]] = []
        sizes: list[CacheSize] = []
        prefill_seconds = decode_seconds = 0.0
        decoding = press is not None and press.schedule.decodes
        for reading in _readings(prompt, options, press, cache):
            held, seconds = read_context(
                self.model,
                reading.ids,
                press,
                cache,
                chunk_size=prefill_chunk_size,
                mode=prefill_mode,
                storage=storage,
                question=reading.question,
                tokenizer=self.tokenizer,
            )
            sizes.append(size_of(held))
            start = time.perf_counter()
            # The press acts on answers only if it is made for that, and never on questions.
            with press(self.model, turns="first") if press and decoding else nullcontext():
                tokens += self.generate_answer(
                    held, reading.question_ids, reading.limits, generation or {}
                )
            prefill_seconds += seconds
            decode_seconds += time.perf_counter() - start
        answers = Answers(
            texts=[str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in tokens],
            context_tokens=prompt.context_ids.shape[1],
            cache=sizes[-1],
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            tokens=tokens,
            cut_tokens=prompt.cut,
        )
        return {"answers": answers, "one": options.questions is None}

    def generate_answer(
        self,
        cache: Cache,
        question_ids: list[Tensor],
        limits: list[int],
        generation: Mapping[str, object],
    ) -> list[list[int]]:
        """Answer all questions as one batch on a fork of the cache, which stays as it is.

        Questions of different lengths are padded on the left. Sliding windows and recurrent
        states would count that padding, so in models that have them only questions of the same
        length share a batch.

        Returns:
            Token ids of each answer, the end-of-sequence token left out.
        """
        batches = [list(range(len(question_ids)))]
        if not has_only_full_attention(self.model):
            lengths = [ids.shape[1] for ids in question_ids]
            batches = [
                [i for i, n in enumerate(lengths) if n == length] for length in sorted(set(lengths))
            ]
        answers: dict[int, list[int]] = {}
        for batch in batches:
            ids = [question_ids[i] for i in batch]
            most = max(limits[i] for i in batch)
            batch_cache = fork(cache, len(ids))
            tokens = generate(self.model, self._tokenizer, batch_cache, ids, most, generation)
            answers |= {i: row[: limits[i]] for i, row in zip(batch, tokens, strict=True)}
        return [answers[i] for i in range(len(question_ids))]

    def postprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_outputs: dict, return_stats: bool = False
    ) -> dict:
        """``{"answer": ...}`` or ``{"answers": [...]}``, with "stats" when asked for."""
        answers: Answers = model_outputs["answers"]
        if model_outputs["one"]:
            result: dict[str, object] = {"answer": answers.texts[0]}
        else:
            result = {"answers": answers.texts}
        return {**result, "stats": answers} if return_stats else result


def _readings(
    prompt: Prompt, options: PromptOptions, press: BasePress | None, cache: Cache | None
) -> list[_Reading]:
    """The context once for all questions, or with each of them if the press looks at questions."""
    if press is None or not press.needs.question:
        return [_Reading(prompt.context_ids, None, prompt.question_ids, options.limits)]
    if not all(asked.strip() for asked in options.asked):
        raise CachepressError(
            f"{press!r} chooses by the question, and there is none: give question or questions, "
            "and do not move it into the context"
        )
    if cache is not None and len(prompt.question_ids) > 1:
        raise CachepressError(
            f"{press!r} needs a cache for each question: ask one, or pass no cache"
        )
    return [
        _Reading(
            torch.cat([prompt.context_ids, ids[:, :-1]], dim=1),
            max(1, ids.shape[1] - 1),
            [ids[:, -1:]],
            [limit],
        )
        for ids, limit in zip(prompt.question_ids, options.limits, strict=True)
    ]


def make_prompt(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    context: str,
    options: PromptOptions,
) -> Prompt:
    """``prompt_within``, for a model that is loaded."""
    positions = getattr(model.get_decoder().config, "max_position_embeddings", None)
    return prompt_within(tokenizer, positions, context, options)


def prompt_within(
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    context: str,
    options: PromptOptions,
) -> Prompt:
    """Tokenise a context and its questions apart, so that the one never sees the others.

    Args:
        tokenizer: the model's.
        positions: most tokens that the model was trained for; None for any number.
        context: the text.
        options: how it is asked about.

    Raises:
        CachepressError: if the context is empty, or longer than allowed and not to be cut.
    """
    if not isinstance(context, str) or not context.strip():
        raise CachepressError("the context is empty: wanted a text to ask questions about")
    if not context.endswith(options.suffix):
        raise CachepressError(f"the context does not end with the suffix {options.suffix!r}")
    plain = not tokenizer.chat_template or not options.chat
    before, after = ("", "") if plain else template(tokenizer, options.enable_thinking)
    context_ids = encode(tokenizer, before + context.removesuffix(options.suffix), special=plain)
    suffix_ids = encode(tokenizer, options.suffix, special=False)
    context_ids = torch.cat([context_ids, suffix_ids], dim=1)
    question_ids = [
        encode(tokenizer, asked + after + prefix, special=False)
        for asked, prefix in zip(options.asked, options.prefixes, strict=True)
    ]
    # An answer needs a token to start from, so a context without questions lends its last one.
    lent = int(not all(ids.shape[1] for ids in question_ids))
    lengths = [ids.shape[1] for ids in question_ids]
    said = [encode(tokenizer, text, special=False).shape[1] for text in options.forced]
    said += [0] * (len(lengths) - len(said))
    each = zip(lengths, options.limits, said, strict=True)
    beside = lent + max(length + max(limit, n) for length, limit, n in each)
    room = _room(positions, beside, options)
    n, cut = context_ids.shape[1] - lent, 0
    if n > room:
        if not options.truncation:
            raise CachepressError(
                f"the context has {n} tokens, but there is room for {room}: shorten it, or ask for "
                "truncation"
            )
        asked = max(0, min(lengths) - encode(tokenizer, after, special=False).shape[1])
        context_ids, cut = _cut(tokenizer, context_ids, before, options, room + lent, asked)
    if lent:
        last = context_ids[:, -1:]
        context_ids = context_ids[:, :-1]
        question_ids = [torch.cat([last, ids], dim=-1) for ids in question_ids]
    return Prompt(context_ids, question_ids, cut)


def _cut(
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    before: str,
    options: PromptOptions,
    room: int,
    asked: int,
) -> tuple[Tensor, int]:
    """Cut a context that is too long, and say how many of its tokens are gone.

    The chat template's part before it and the suffix stay. Benchmarks cut the middle of the whole
    prompt, so the suffix and the tokens that are asked behind it are part of the second half.
    """
    separator = encode(tokenizer, options.separator, special=False)
    fixed = encode(tokenizer, before, special=False).shape[1] if before else 0
    n, free = ids.shape[1], room - fixed - separator.shape[1]
    tail = encode(tokenizer, options.suffix, special=False).shape[1]
    if options.truncation == MIDDLE:
        tail = max(tail, free - (free + asked) // 2)
    head = free - tail
    if head < 1:
        raise CachepressError(
            f"no room for a context: {room} tokens are allowed, and what a cut spares (chat "
            f"template, separator and question) takes {room - head}: allow more"
        )
    cut = torch.cat([ids[:, : fixed + head], separator, ids[:, n - tail :]], dim=1)
    return cut, n - fixed - free


def read_context(
    model: PreTrainedModel,
    context_ids: Tensor,
    press: BasePress | None,
    cache: Cache | None = None,
    *,
    chunk_size: int | None = None,
    mode: str = "exact",
    storage: str | Codec = "full",
    question: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Cache, float]:
    """Read a context ``[1, T]`` under a press, unless the cache holds it already.

    Args:
        model: the model.
        context_ids: the context.
        press: the press; None leaves the cache whole.
        cache: an empty cache to fill, or one that holds this context already.
        chunk_size: tokens that are computed at once; None for all.
        mode: "exact" or "online", see ``cachepress.prefill``.
        storage: "full", "int8", "int4", "int2", or a Codec.
        question: tokens at the end that are the question, for presses that look at it.
        tokenizer: the model's tokenizer, for presses that replay.

    Returns:
        The cache, and the seconds that reading took.

    Raises:
        CachepressError: if the cache holds something else.
    """
    seen, n = 0 if cache is None else cache.get_seq_length(), context_ids.shape[1]
    if cache is not None and seen:
        if seen != n:
            raise CachepressError(
                f"the cache holds {seen} tokens but the context has {n}: pass an empty cache, or "
                "the one that this very context was compressed into"
            )
        known = text_of(cache)
        if known is not None and not torch.equal(
            known.cpu(), context_ids[:, : known.shape[1]].cpu()
        ):
            raise CachepressError(
                "the cache holds another text of the same length: pass an empty cache, or the one "
                "that this very context was compressed into"
            )
        return cache, 0.0
    start = time.perf_counter()
    cache = prefill(
        model,
        context_ids,
        press,
        cache,
        chunk_size=chunk_size,
        mode=mode,
        storage=storage,
        question=question,
        tokenizer=tokenizer,
    )
    wait(model.device)
    return cache, time.perf_counter() - start


def _room(positions: int | None, beside: int, options: PromptOptions) -> int:
    """Most tokens that a context may have beside so many of a question and its answer."""
    if options.beyond_trained_length:
        positions = None
    room = None if positions is None else positions - beside
    limits = [n for n in (room, options.max_context_length) if n is not None]
    least = min(limits, default=2**63)
    if least < 1:
        raise CachepressError(
            f"no room for a context: {beside} tokens of question and answer, a limit of "
            f"{positions} positions and max_context_length={options.max_context_length}"
        )
    return least


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=KVPressTextGenerationPipeline, pt_model=AutoModelForCausalLM
)
