"""Answers all questions about a context, under one press or under many that share its prefill.

Nothing is written here, see ``cachepress.evaluation.run``.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

import torch

from cachepress.cache.batch import fork, ordinary, size_of
from cachepress.cache.joined import is_plain
from cachepress.errors import CachepressError
from cachepress.evaluation.batches import MOST_TOKENS, Batch, Fork, Reference
from cachepress.evaluation.records import Answer
from cachepress.evaluation.run import Run
from cachepress.evaluation.samples import Context
from cachepress.evaluation.speed import CONTEXTS, step_seconds
from cachepress.evaluation.tasks.base import PERPLEXITY
from cachepress.generation.pipeline import TASK, Answers, KVPressTextGenerationPipeline
from cachepress.generation.prompt import Prompt, make_prompt
from cachepress.hf import has_only_full_attention, text_decoder
from cachepress.hf.session import prepared
from cachepress.hf.shared_prefill import SharedPrefill, shares
from cachepress.hf.types import (
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
)
from cachepress.measure import machine_of, process_peak_memory

logger = logging.getLogger(__name__)
ROOM = 2 << 30
"""Bytes of caches that are decoded from at once; twice the whole cache, if that is more."""
Found = dict[int, Answer]
"""Answers of a run to a context, by sample id."""


class Answerer:
    """Generates the answers of evaluations of one model.

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
        """Find presses that do not fit the model and contexts that are too long, before any work.

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
        """Return why a press does not fit the model or the data set; None if it does."""
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

    def alone(self, run: Run, context: Context, reference: Reference | None = None) -> Found:
        """Answer a context's questions under one press, with a prefill of its own."""
        press = run.press
        asks = press is not None and press.needs.question
        if asks and len(context.samples) > 1:
            parts = [None] * len(context.samples) if reference is None else reference.parts()
            found: Found = {}
            for one, part in zip(context.one_by_one(), parts, strict=True):
                found |= self.alone(run, one, part)
            return found
        cache = DynamicCache(config=text_decoder(self.model).config)
        answers = self._piped(run, context, cache)
        forked = Fork(run, cache, answers.cache, answers.prefill_seconds, None)
        if context.number < CONTEXTS:
            self._time([forked])
        prompt = self._prompt(context, run)
        questions, text = prompt.question_ids, prompt.context_ids
        if asks:
            text = torch.cat([text, questions[0][:, :-1]], dim=1)
            questions = [ids[:, -1:] for ids in questions]
        batch = Batch(self.model, self.tokenizer, [forked], questions, text)
        kls = batch.divergences(reference)[0]
        nlls = batch.likelihoods(self._texts(context))[0]
        size = (answers.context_tokens, answers.cut_tokens)
        return self._found(forked, context, size, answers.tokens, kls, nlls)

    def together(self, runs: Sequence[Run], context: Context) -> Iterator[tuple[Run, Found]]:
        """Answer a context's questions under several presses, with one prefill where that works.

        One reading serves all presses that can share it; each compresses a fork of the whole
        cache, and forks that are stored alike are decoded as one batch. Others read for
        themselves.
        """
        shared = list(filter(shares_reading, runs))
        reference = None
        if shared or self._kl:
            prompt = self._prompt(context, runs[0])
            prefill = self._shared_prefill(shared, prompt, runs[0])
            limits = [sample.max_new_tokens for sample in context.samples]
            if self._kl:
                whole = Fork(None, prefill.cache, size_of(prefill.cache), 0.0, None)
                reference = self._batch([whole], prompt).reference(limits)
            for forks in self._forks(prefill, shared, context):
                if context.number < CONTEXTS:
                    self._time(forks)
                yield from self._answered(forks, prompt, context, reference)
            del prefill
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

    def _shared_prefill(self, shared: Sequence[Run], prompt: Prompt, run: Run) -> SharedPrefill:
        presses = [run.press for run in shared if run.press is not None]
        prefill = SharedPrefill(self.model, presses, self.tokenizer)
        prefill.read(prompt.context_ids, run.config.prefill_chunk_size)
        return prefill

    def _forks(
        self, prefill: SharedPrefill, runs: Sequence[Run], context: Context
    ) -> Iterator[list[Fork]]:
        """Compress forks of a prefill, and yield those that are decoded as one batch."""
        room, most = max(ROOM, 2 * prefill.whole_bytes), self._most_forks(context)
        some: list[Fork] = []
        for run in runs:
            forked = _forked(prefill, run)
            if most == 1 or forked.acting is not None or not is_plain(forked.cache):
                yield [forked]
                continue
            held = sum(other.size.bytes_after for other in some)
            if some and (len(some) >= most or held + forked.size.bytes_after > room):
                yield some
                some = []
            some.append(forked)
        if some:
            yield some

    def _most_forks(self, context: Context) -> int:
        """Compute how many forks can be decoded as one batch."""
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

    def _time(self, forks: Sequence[Fork]) -> None:
        """Time decoding from each fork; without a press, from transformers' own cache."""
        plain = [one.run is not None and one.run.press is None for one in forks]
        caches = [
            (ordinary(one.cache) if whole else one.cache, one.acting)
            for one, whole in zip(forks, plain, strict=True)
        ]
        for one, step in zip(forks, step_seconds(self.model, caches), strict=True):
            one.step = step

    def _batch(self, forks: Sequence[Fork], prompt: Prompt) -> Batch:
        return Batch(self.model, self.tokenizer, forks, prompt.question_ids, prompt.context_ids)

    def _texts(self, context: Context) -> list[list[int]] | None:
        """Tokenise the texts whose perplexity is measured; None if there are none."""
        samples = context.samples
        if not any(sample.metric == PERPLEXITY for sample in samples):
            return None
        return [self.tokenizer.encode(s.answer[0], add_special_tokens=False) for s in samples]

    def _answered(
        self,
        forks: Sequence[Fork],
        prompt: Prompt,
        context: Context,
        reference: Reference | None,
    ) -> Iterator[tuple[Run, Found]]:
        """Decode a batch of forks, and yield the answers of each run."""
        batch, limits = self._batch(forks, prompt), [s.max_new_tokens for s in context.samples]
        answers = batch.answers(max(limits))
        kls, nlls = batch.divergences(reference), batch.likelihoods(self._texts(context))
        read = (prompt.context_ids.shape[1], prompt.cut)
        for one, tokens, kl, nll in zip(batch.forks, answers, kls, nlls, strict=True):
            said = [ids[:limit] for ids, limit in zip(tokens, limits, strict=True)]
            assert one.run is not None
            yield one.run, self._found(one, context, read, said, kl, nll)

    def _found(
        self,
        forked: Fork,
        context: Context,
        read: tuple[int, int],
        tokens: Sequence[Sequence[int]],
        kls: Sequence[float | None],
        nlls: Sequence[float | None],
    ) -> Found:
        """Make a fork's answers to a context, ``read`` being its tokens read and those cut off."""
        columns = zip(context.samples, tokens, kls, nlls, strict=True)
        step, step_low, step_high = forked.step or (None, None, None)
        peak = process_peak_memory(self.model.device) if forked.press_seconds is None else None
        return {
            sample.sample_id: Answer(
                predicted_answer=str(self.tokenizer.decode(list(ids), skip_special_tokens=True)),
                decode_tokens=len(ids),
                context_tokens=read[0],
                cut_tokens=read[1],
                prompts=forked.run.config.prompts_label if forked.run else None,
                prefill_seconds=forked.prefill_seconds,
                press_seconds=forked.press_seconds,
                step_seconds=step,
                step_seconds_low=step_low,
                step_seconds_high=step_high,
                bytes_before=forked.size.bytes_before,
                bytes_after=forked.size.bytes_after,
                rows_seen=forked.size.pairs_seen,
                rows_held=forked.size.pairs_held,
                peak_memory_bytes=peak,
                machine=self._machine,
                kl=kl,
                nll=nll,
            )
            for sample, ids, kl, nll in columns
        }


def pipeline_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> KVPressTextGenerationPipeline:
    """Make the text-generation pipeline of a model that is loaded."""
    # What transformers says of its parameter leaves out the fast tokenizers, which it takes.
    named = cast(PreTrainedTokenizer, tokenizer)
    return KVPressTextGenerationPipeline(model, named, task=TASK, device=model.device)


def answers_of(
    pipe: KVPressTextGenerationPipeline, context: str, options: Mapping[str, object]
) -> Answers:
    """Answer questions on one context through the pipeline."""
    found = pipe(context, **options, return_stats=True)
    assert isinstance(found, dict)
    return found["stats"]


def shares_reading(run: Run) -> bool:
    """Tell whether a run's press can compress a fork of a prefill shared with other presses."""
    if run.press is None:
        return True
    return shares(run.press) and run.config.prefill_mode == "exact"


def _forked(prefill: SharedPrefill, run: Run) -> Fork:
    """Compress a fork of a shared prefill by a run's press."""
    if run.press is None:
        size = size_of(ordinary(prefill.cache))
        return Fork(run, fork(prefill.cache), size, prefill.seconds, 0.0)
    cache, seconds = prefill.compressed(run.press, run.config.storage)
    return Fork(run, cache, size_of(cache), prefill.seconds + seconds, seconds)
