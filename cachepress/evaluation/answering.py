"""Reads a context and answers its questions: under one press, or under many at once."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from cachepress.bench import machine_of
from cachepress.cache.batch import CacheSize, fork, grouped, is_plain, join, ordinary, size_of
from cachepress.errors import CachepressError
from cachepress.evaluation.run import Answer, Run
from cachepress.evaluation.samples import Context
from cachepress.evaluation.speed import CONTEXTS, StepSeconds, peak_memory, step_seconds
from cachepress.evaluation.tasks.base import PERPLEXITY
from cachepress.generation.decode import Forced, force, generate
from cachepress.generation.pipeline import TASK, Answers, KVPressTextGenerationPipeline
from cachepress.generation.prompt import Prompt, make_prompt
from cachepress.hf import has_only_full_attention
from cachepress.hf.session import prepared
from cachepress.hf.shared_prefill import SharedPrefill, shares
from cachepress.hf.types import (
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
)
from cachepress.presses import BasePress

logger = logging.getLogger(__name__)
ROOM = 2 << 30
"""Bytes of caches that are decoded from at once; twice the whole cache, if that is more."""
MOST_TOKENS = 64
"""Tokens of an answer over which a divergence is taken, at most."""
_T = TypeVar("_T")
Found = dict[int, Answer]
"""Answers of a run to a context, by sample id."""


@dataclass(frozen=True)
class _Reference:
    """What the uncompressed model says to each question, and what it expects meanwhile."""

    texts: list[Forced]
    expected: list[Tensor]

    def parts(self) -> "list[_Reference]":
        """That of each question alone."""
        pairs = zip(self.texts, self.expected, strict=True)
        return [_Reference([text], [expected]) for text, expected in pairs]


@dataclass(eq=False)
class _Fork:
    """The cache that a press left, and what it cost."""

    run: Run | None
    cache: Cache
    size: CacheSize
    prefill_seconds: float
    press_seconds: float | None
    step: StepSeconds | None = None

    @property
    def shared(self) -> bool:
        """Whether others shared its reading."""
        return self.press_seconds is not None

    @property
    def acting(self) -> BasePress | None:
        """The press, if it acts while answers are decoded."""
        press = None if self.run is None else self.run.press
        return press if press is not None and press.schedule.decodes else None


class _Batch:
    """Forks that are decoded together, each of them once for every question.

    Args:
        forks: what is decoded from.
        n: questions.
    """

    def __init__(self, forks: Sequence[_Fork], n: int) -> None:
        caches = [left.cache for left in forks]
        self._groups = [[forks[place] for place in group] for group in grouped(caches)]
        self._n, self.acting = n, forks[0].acting

    @property
    def forks(self) -> list[_Fork]:
        """The forks, in the order of the batch."""
        return [left for group in self._groups for left in group]

    def cache(self) -> Cache:
        """A cache to continue."""
        return fork(self._whole)

    @cached_property
    def _whole(self) -> Cache:
        groups = [[left.cache for left in group] for group in self._groups]
        if len(groups) == 1 and len(groups[0]) == 1:
            return fork(groups[0][0], self._n)
        return join(groups, self._n)

    def spread(self, of_questions: Sequence[_T]) -> list[_T]:
        """What belongs to each question, for each sequence of the batch."""
        return [x for group in self._groups for x in of_questions for _ in group]

    def gathered(self, of_sequences: Sequence[_T]) -> list[list[_T]]:
        """What belongs to each sequence, for each fork and question."""
        found, first = [], 0
        for group in self._groups:
            size = len(group)
            some = of_sequences[first : first + size * self._n]
            found += [list(some[i::size]) for i in range(size)]
            first += size * self._n
        return found


class Answerer:
    """Answers for runs of one model.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        batch_size: most sequences that are decoded at once by runs that share a reading.
        kl: whether answers are compared with what the uncompressed model expects.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 128,
        kl: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._batch_size, self._kl = batch_size, kl
        self._machine = machine_of(model)
        self._padding = has_only_full_attention(model)

    def check(self, runs: Sequence[Run], contexts: Sequence[Context]) -> dict[Path, str]:
        """Look for what cannot work before anything is computed.

        Returns:
            The reason for each run, by its folder, whose press does not fit the model.

        Raises:
            CachepressError: if a context is too long.
        """
        unfit, tried = {}, {}
        empty = any(not s.question.strip() for context in contexts for s in context.samples)
        for run in runs:
            if run.config.press_name not in tried:
                tried[run.config.press_name] = self._misfit(run, empty)
            if (reason := tried[run.config.press_name]) is not None:
                unfit[run.folder] = reason
        cuts = []
        for context in contexts:
            try:
                cuts.append(self._prompt(context, runs[0]).cut)
            except CachepressError as error:
                first = context.samples[0].sample_id
                raise CachepressError(f"sample {first}: {error}") from error
        if gone := sum(cuts):
            some = sum(map(bool, cuts))
            logger.warning("%d of %d contexts are cut, by %d tokens in all", some, len(cuts), gone)
        return unfit

    def _misfit(self, run: Run, empty: bool) -> str | None:
        """Why a press cannot be used here; None if it can."""
        if run.press is None:
            return None
        try:
            press = prepared(run.press, self.model)
            if press.needs.question and empty:
                return f"{press!r} chooses by the question, and there is none in this data set"
            if shares(press):
                ids = self.tokenizer("A few words to try it on.", return_tensors="pt").input_ids
                SharedPrefill(self.model, [press], self.tokenizer).read(ids)
        except CachepressError as error:
            return str(error)
        return None

    def alone(self, run: Run, context: Context, reference: _Reference | None = None) -> Found:
        """Answers of a run with a reading of its own, through the pipeline."""
        press = run.press
        asks = press is not None and press.needs.question
        if asks and len(context.samples) > 1:
            parts = [None] * len(context.samples) if reference is None else reference.parts()
            found: Found = {}
            for one, part in zip(context.one_by_one(), parts, strict=True):
                found |= self.alone(run, one, part)
            return found
        cache = DynamicCache(config=self.model.get_decoder().config)
        answers = self._piped(run, context, cache)
        left = _Fork(run, cache, answers.cache, answers.prefill_seconds, None)
        if context.number < CONTEXTS:
            self._time([left])
        questions = self._prompt(context, run).question_ids
        questions = [ids[:, -1:] for ids in questions] if asks else questions
        batch = _Batch([left], len(questions))
        kls = self._divergences(batch, questions, reference)[0]
        nlls = self._likelihoods(batch, questions, context)[0]
        size = (answers.context_tokens, answers.cut_tokens)
        return self._found(left, context, size, answers.tokens, kls, nlls)

    def together(self, runs: Sequence[Run], context: Context) -> Iterator[tuple[Run, Found]]:
        """Answers of runs that share what can be shared.

        One reading serves all presses that can look at one; each settles a fork of the whole
        cache, and forks that are stored alike are decoded as one batch. Others read for
        themselves.
        """
        shared = list(filter(shares_reading, runs))
        reference = None
        if shared or self._kl:
            prompt = self._prompt(context, runs[0])
            survey = self._survey(shared, prompt, runs[0])
            if self._kl:
                reference = self._reference(survey.cache, prompt, context)
            for some in self._batches(survey, shared, context):
                if context.number < CONTEXTS:
                    self._time(some)
                yield from self._answered(
                    _Batch(some, len(context.samples)), prompt, context, reference
                )
            del survey
        for run in runs:
            if not shares_reading(run):
                yield run, self.alone(run, context, reference)

    @cached_property
    def _pipe(self) -> KVPressTextGenerationPipeline:
        return pipeline_of(self.model, self.tokenizer)

    def _piped(self, run: Run, context: Context, cache: Cache) -> Answers:
        names = ("prefill_chunk_size", "prefill_mode", "storage")
        how = {name: getattr(run.config, name) for name in names}
        options = vars(context.prompt_options(run.config))
        options = {name: value for name, value in options.items() if name != "question"}
        how |= {"press": run.press, "cache": cache, **options}
        return answers_of(self._pipe, context.text, how)

    def _prompt(self, context: Context, run: Run) -> Prompt:
        options = context.prompt_options(run.config)
        return make_prompt(self.tokenizer, self.model, context.text, options)

    def _survey(self, shared: Sequence[Run], prompt: Prompt, run: Run) -> SharedPrefill:
        presses = [run.press for run in shared if run.press is not None]
        survey = SharedPrefill(self.model, presses, self.tokenizer)
        survey.read(prompt.context_ids, run.config.prefill_chunk_size)
        return survey

    def _fork(self, survey: SharedPrefill, run: Run) -> _Fork:
        if run.press is None:
            size = size_of(ordinary(survey.cache))
            return _Fork(run, fork(survey.cache), size, survey.seconds, 0.0)
        cache, seconds = survey.compressed(run.press, run.config.storage)
        return _Fork(run, cache, size_of(cache), survey.seconds + seconds, seconds)

    def _batches(
        self, survey: SharedPrefill, runs: Sequence[Run], context: Context
    ) -> Iterator[list[_Fork]]:
        """Forks that can be decoded together, as many as there is room for."""
        room, most = max(ROOM, 2 * survey.whole_bytes), self._most_forks(context)
        some: list[_Fork] = []
        for run in runs:
            left = self._fork(survey, run)
            if most == 1 or left.acting is not None or not is_plain(left.cache):
                yield [left]
                continue
            held = sum(other.size.bytes_after for other in some)
            if some and (len(some) >= most or held + left.size.bytes_after > room):
                yield some
                some = []
            some.append(left)
        if some:
            yield some

    def _most_forks(self, context: Context) -> int:
        """How many forks can be decoded together."""
        samples = context.samples
        if not self._padding or any(sample.metric == PERPLEXITY for sample in samples):
            return 1
        most = self._batch_size // len(samples)
        if self._kl:
            longest = min(MOST_TOKENS, max(sample.max_new_tokens for sample in samples)) + 1
            # Logits, and log-probabilities, in float32.
            each = 8 * len(samples) * longest * self.model.config.get_text_config().vocab_size
            most = min(most, ROOM // each)
        return max(1, most)

    def _time(self, forks: Sequence[_Fork]) -> None:
        """Time decoding after each fork; without a press, after transformers' own cache."""
        pairs = [
            (
                ordinary(left.cache) if left.run and left.run.press is None else left.cache,
                left.acting,
            )
            for left in forks
        ]
        for left, step in zip(forks, step_seconds(self.model, pairs), strict=True):
            left.step = step

    def _reference(self, cache: Cache, prompt: Prompt, context: Context) -> _Reference:
        limits = [sample.max_new_tokens for sample in context.samples]
        whole = _Batch([_Fork(None, cache, size_of(cache), 0.0, None)], len(limits))
        (said,) = self._said(whole, prompt.question_ids, max(limits))
        texts = [
            Forced(ids, tokens[: min(limit, MOST_TOKENS)])
            for ids, tokens, limit in zip(prompt.question_ids, said, limits, strict=True)
        ]
        return _Reference(texts, self._expected(whole, texts)[0])

    def _answered(
        self, batch: _Batch, prompt: Prompt, context: Context, reference: _Reference | None
    ) -> Iterator[tuple[Run, Found]]:
        """Answers of forks that are one batch."""
        limits, questions = [s.max_new_tokens for s in context.samples], prompt.question_ids
        with batch.acting(self.model, turns="first") if batch.acting else nullcontext():
            tokens = self._said(batch, questions, max(limits))
        kls = self._divergences(batch, questions, reference)
        nlls = self._likelihoods(batch, questions, context)
        read = (prompt.context_ids.shape[1], prompt.cut)
        for left, rows, kl, nll in zip(batch.forks, tokens, kls, nlls, strict=True):
            said = [row[:limit] for row, limit in zip(rows, limits, strict=True)]
            assert left.run is not None
            yield left.run, self._found(left, context, read, said, kl, nll)

    def _said(self, batch: _Batch, questions: Sequence[Tensor], most: int) -> list[list[list[int]]]:
        """Token ids of the answer of each fork to each question."""
        if self._padding:
            every, cache = batch.spread(questions), batch.cache()
            found = generate(self.model, self.tokenizer, cache, every, most, {})
            return batch.gathered(found)
        # Sliding windows and recurrent states would count padding.
        (left,) = batch.forks
        return [
            [
                generate(self.model, self.tokenizer, fork(left.cache), [ids], most, {})[0]
                for ids in questions
            ]
        ]

    def _expected(self, batch: _Batch, texts: Sequence[Forced]) -> list[list[Tensor]]:
        """What is expected at each token of each text, after each fork."""
        if self._padding:
            return batch.gathered(force(self.model, batch.cache(), batch.spread(texts)))
        (left,) = batch.forks
        return [[force(self.model, fork(left.cache), [text])[0] for text in texts]]

    def _divergences(
        self, batch: _Batch, questions: Sequence[Tensor], reference: _Reference | None
    ) -> list[list[float | None]]:
        """KL divergence of each fork and question, in nats a token.

        None under a press that acts while answers are decoded: it sees no given text.
        """
        if reference is None or batch.acting is not None:
            return [[None] * len(questions) for _ in batch.forks]
        texts = [
            Forced(ids, text.answer) for ids, text in zip(questions, reference.texts, strict=True)
        ]
        return [
            [_divergence(p, q) for p, q in zip(reference.expected, row, strict=True)]
            for row in self._expected(batch, texts)
        ]

    def _likelihoods(
        self, batch: _Batch, questions: Sequence[Tensor], context: Context
    ) -> list[list[float | None]]:
        """Negative log-likelihood of each fork and sample, in nats a token, where it is asked.

        None under a press that acts while answers are decoded, as for divergences.
        """
        asked = any(sample.metric == PERPLEXITY for sample in context.samples)
        if not asked or batch.acting is not None:
            return [[None] * len(questions) for _ in batch.forks]
        texts = [
            Forced(ids, self.tokenizer.encode(sample.answer[0], add_special_tokens=False))
            for ids, sample in zip(questions, context.samples, strict=True)
        ]
        return [
            [_nll(expected, text.answer) for expected, text in zip(row, texts, strict=True)]
            for row in self._expected(batch, texts)
        ]

    def _found(
        self,
        left: _Fork,
        context: Context,
        read: tuple[int, int],
        tokens: Sequence[Sequence[int]],
        kls: Sequence[float | None],
        nlls: Sequence[float | None],
    ) -> Found:
        """Answers of a context of which so many tokens were read, and so many cut."""
        columns = zip(context.samples, tokens, kls, nlls, strict=True)
        return {
            sample.sample_id: Answer(
                predicted_answer=str(self.tokenizer.decode(list(ids), skip_special_tokens=True)),
                decode_tokens=len(ids),
                context_tokens=read[0],
                cut_tokens=read[1],
                prompts=left.run.config.prompts_label if left.run else None,
                prefill_seconds=left.prefill_seconds,
                press_seconds=left.press_seconds,
                step_seconds=None if left.step is None else left.step.median,
                step_seconds_low=None if left.step is None else left.step.low,
                step_seconds_high=None if left.step is None else left.step.high,
                bytes_before=left.size.bytes_before,
                bytes_after=left.size.bytes_after,
                rows_seen=left.size.rows_seen,
                rows_held=left.size.rows_held,
                peak_memory_bytes=None if left.shared else peak_memory(self.model.device),
                machine=self._machine,
                kl=kl,
                nll=nll,
            )
            for sample, ids, kl, nll in columns
        }


def pipeline_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> KVPressTextGenerationPipeline:
    """The text-generation pipeline of a model that is loaded."""
    # What transformers says of its parameter leaves out the fast tokenizers, which it takes.
    named = cast(PreTrainedTokenizer, tokenizer)
    return KVPressTextGenerationPipeline(model, named, task=TASK, device=model.device)


def answers_of(
    pipe: KVPressTextGenerationPipeline, context: str, options: Mapping[str, object]
) -> Answers:
    """Answers to questions on one context, and what they cost."""
    found = pipe(context, **options, return_stats=True)
    assert isinstance(found, dict)
    return found["stats"]


def shares_reading(run: Run) -> bool:
    """Whether a run can look at a reading that it shares with others."""
    if run.press is None:
        return True
    return shares(run.press) and run.config.prefill_mode == "exact"


def _divergence(p: Tensor, q: Tensor) -> float:
    """KL divergence of log-probabilities ``q [n, vocabulary]`` from ``p``, mean over tokens."""
    return float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0))


def _nll(expected: Tensor, answer: Sequence[int]) -> float:
    tokens = torch.tensor(list(answer), device=expected.device)
    return float(-expected[: len(tokens)].gather(-1, tokens[:, None]).mean())
