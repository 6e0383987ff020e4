"""The transformers pipeline: prefill a context once, compress, answer many questions from that."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Pipeline,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils.generic import ModelOutput

from cachepress.cache.batch import CacheSize, fork, size_of
from cachepress.cache.codec import Codec
from cachepress.errors import CachepressError
from cachepress.generation.answering import Generated, generate
from cachepress.generation.messages import (
    Messages,
    PicturePrompt,
    as_messages,
    picture_prompt,
    read_pictures,
)
from cachepress.generation.options import (
    answers_each,
    check_generation,
    known_options,
    one_by_one,
    reads_order,
)
from cachepress.generation.prefill import read_context
from cachepress.generation.prompt import MIDDLE, Prompt, PromptOptions, make_prompt
from cachepress.given import press_of
from cachepress.hf import has_only_full_attention, text_decoder, unobserved
from cachepress.measure import Stopwatch
from cachepress.models.chat import encode
from cachepress.press import BasePress

TASK = "kv-press-text-generation"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answers:
    """Answers from one compressed cache, with their times and the cache's size.

    Attributes:
        texts: the answers, question after question; one each, or ``num_return_sequences``.
        context_tokens: tokens of the context, the chat template's part included.
        cut_tokens: tokens of a context that was too long which were cut.
        cache: size of the cache after compression, before the first question; under a press that
            observes the question, of the last question's cache.
        prefill_seconds: time of the context's forward, compression included; 0 if it was reused.
            Under a press that observes the question, of all forwards, one for each question.
        decode_seconds: time of all questions and answers.
        tokens: the answers as token ids, without end tokens.
        outputs: what transformers' ``generate`` returned for each question, with
            ``return_dict_in_generate``; else empty.
        each: answers of each question.
    """

    texts: list[str]
    context_tokens: int
    cache: CacheSize
    prefill_seconds: float
    decode_seconds: float
    tokens: list[list[int]]
    cut_tokens: int = 0
    outputs: list[ModelOutput] = field(default_factory=list)
    each: int = 1

    @property
    def decode_tokens(self) -> int:
        """Number of tokens of all answers."""
        return sum(map(len, self.tokens))


@dataclass(frozen=True)
class Prefill:
    """A prompt that is prefilled, and the questions that follow it.

    Attributes:
        ids: ``[1, T]`` token ids of the prompt.
        question: number of tokens at its end that are the question; None where the press does not
            need it.
        question_ids: the token ids that follow, for each answer.
        limits: most new tokens of each answer.
    """

    ids: Tensor
    question: int | None
    question_ids: list[Tensor]
    limits: list[int]


class KVPressTextGenerationPipeline(Pipeline):
    """The pipeline ``pipeline("kv-press-text-generation", model=..., tokenizer=...)``.

    ``pipe(context, questions=[...], press=press)`` gives ``{"answers": [...]}``, and with
    ``question="..."`` ``{"answer": "..."}``; a list of contexts gives a list of these. Options of
    a call: those of ``PromptOptions``; ``press``, or its spelling; ``cache``, an empty
    ``DynamicCache()`` to keep the compressed context in, or one that holds it already;
    ``prefill_chunk_size``, ``prefill_mode``, ``storage`` and ``offload``, see
    ``cachepress.prefill``; ``return_stats`` to get the ``Answers`` under "stats"; ``streamer``,
    which gets the tokens of one question's one answer as they come; and the options of
    transformers' ``GenerationConfig``. Answers are greedy unless ``do_sample=True``.

    A context may be the messages of a chat, each picture as ``{"type": "image", "image": ...}``, if
    the pipeline was made with ``processor=``; the questions follow the last message.

    With ``num_return_sequences=n`` an answer is a list of ``n`` texts. With
    ``return_dict_in_generate=True`` there is also what transformers' ``generate`` returned, under
    "output", or a list with one for each question under "outputs"; questions are then answered one
    by one, so that nothing in it is padded. Options that read the prompt, such as
    ``repetition_penalty``, read the context as well. Options that mean nothing here are refused by
    name: those that count the prompt (``max_length``, ``min_length``), choose another cache, need
    an assistant model or an encoder, or were moved to the Hub.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __call__(self, inputs: str | list, **options: object) -> dict | list[dict]:
        """Answer questions on one context, or on each of a list of contexts."""
        inputs = cast(str | list, as_messages(inputs))
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
        names += ("offload", "streamer")
        run = {name: options.pop(name) for name in names if name in options}
        run |= {"press": press_of(run["press"])} if "press" in run else {}
        post = {name: options.pop(name) for name in ("return_stats",) if name in options}
        unknown = options.keys() - known_options()
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
        self, input_: str | Messages, options: PromptOptions | None = None
    ) -> dict:
        """Tokenise the context apart from its questions."""
        options = options or PromptOptions()
        if isinstance(input_, Messages):
            given = (self.processor, self._tokenizer, self.model)
            return {"prompt": picture_prompt(*given, input_, options), "options": options}
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
        offload: bool = False,
        streamer: BaseStreamer | None = None,
        generation: Mapping[str, object] | None = None,
    ) -> dict:
        prompt, options = input_tensors["prompt"], input_tensors["options"]
        generation = generation or {}
        _check_streamer(streamer, generation, prompt)
        answered: list[Generated] = []
        sizes: list[CacheSize] = []
        prefill_seconds, answering = 0.0, Stopwatch(self.model.device)
        decoding = press is not None and press.schedule.decodes
        for part in _prefills(prompt, options, press, cache):
            stored = {"chunk_size": prefill_chunk_size, "storage": storage}
            stored |= {"offload": offload, "tokenizer": self.tokenizer}
            if isinstance(prompt, PicturePrompt):
                held, seconds = read_pictures(self.model, prompt, press, cache, **stored)
            else:
                stored |= {"mode": prefill_mode, "question": part.question}
                held, seconds = read_context(self.model, part.ids, press, cache, **stored)
            sizes.append(size_of(held))
            prefill_seconds += seconds
            # Only a press that compresses while decoding acts on answers, and none on questions;
            # nor does one whose block the pipeline is called in, when it has a press of its own.
            acting = nullcontext() if press is None else unobserved(text_decoder(self.model))
            if press is not None and decoding:
                acting = press(self.model, turns="first")
            with answering, acting:
                answered += self.generate_answer(held, part, generation, streamer)
        tokens = [ids for found in answered for ids in found.tokens]
        answers = Answers(
            texts=[str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in tokens],
            context_tokens=prompt.context_ids.shape[1],
            cache=sizes[-1],
            prefill_seconds=prefill_seconds,
            decode_seconds=answering.seconds,
            tokens=tokens,
            cut_tokens=prompt.cut,
            outputs=[found.output for found in answered if found.output is not None],
            each=answers_each(generation),
        )
        return {"answers": answers, "one": options.questions is None}

    def generate_answer(
        self,
        cache: Cache,
        part: Prefill,
        generation: Mapping[str, object],
        streamer: BaseStreamer | None = None,
    ) -> list[Generated]:
        """Answer all questions from a fork of the cache, which itself is not changed.

        Questions of different lengths are padded on the left, and share a batch. Sliding windows
        and recurrent states would count that padding, and so would some options; then only
        questions of the same length share a batch.

        Returns:
            What was generated for each question.
        """
        question_ids, n = part.question_ids, answers_each(generation)
        keys = [0] * len(question_ids)
        if one_by_one(generation):
            keys = list(range(len(question_ids)))
        elif reads_order(generation) or not has_only_full_attention(self.model):
            keys = [ids.shape[1] for ids in question_ids]
        answers: dict[int, Generated] = {}
        for key in sorted(set(keys)):
            batch = [i for i, other in enumerate(keys) if other == key]
            ids, most = [question_ids[i] for i in batch], max(part.limits[i] for i in batch)
            found = generate(
                self.model,
                self._tokenizer,
                fork(cache, len(ids)),
                ids,
                most,
                generation,
                streamer,
                part.ids,
            )
            for place, i in enumerate(batch):
                own = found.tokens[place * n : (place + 1) * n]
                answers[i] = Generated([x[: part.limits[i]] for x in own], found.output)
        return [answers[i] for i in range(len(question_ids))]

    def postprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_outputs: dict, return_stats: bool = False
    ) -> dict:
        """Return ``{"answer": ...}`` or ``{"answers": [...]}``, with what else was asked for."""
        answers: Answers = model_outputs["answers"]
        texts: list[object] = list(answers.texts)
        if answers.each > 1:
            starts = range(0, len(texts), answers.each)
            texts = [texts[i : i + answers.each] for i in starts]
        if model_outputs["one"]:
            result: dict[str, object] = {"answer": texts[0]}
            result |= {"output": answers.outputs[0]} if answers.outputs else {}
        else:
            result = {"answers": texts}
            result |= {"outputs": answers.outputs} if answers.outputs else {}
        return {**result, "stats": answers} if return_stats else result


def _check_streamer(
    streamer: BaseStreamer | None, generation: Mapping[str, object], prompt: Prompt
) -> None:
    """Raise CachepressError if there is more than one answer to stream."""
    n = len(prompt.question_ids) * answers_each(generation)
    if streamer is not None and n > 1:
        raise CachepressError(f"streamer: got {n} answers, wanted one question with one answer")


def _prefills(
    prompt: Prompt, options: PromptOptions, press: BasePress | None, cache: Cache | None
) -> list[Prefill]:
    """Prefill the context once for all questions, or with each of them if the press needs it."""
    if press is None or not press.needs.question:
        return [Prefill(prompt.context_ids, None, prompt.question_ids, options.limits)]
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
        Prefill(
            torch.cat([prompt.context_ids, ids[:, :-1]], dim=1),
            max(1, ids.shape[1] - 1),
            [ids[:, -1:]],
            [limit],
        )
        for ids, limit in zip(prompt.question_ids, options.limits, strict=True)
    ]


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=KVPressTextGenerationPipeline, pt_model=AutoModelForCausalLM
)
