"""Decodes the caches of several presses on one context as one batch: answers and likelihoods.

How the context is read, and which caches share a batch, is in ``cachepress.evaluation.answering``.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from cachepress.cache.batch import CacheSize, fork
from cachepress.cache.joined import grouped, join
from cachepress.evaluation.run import Run
from cachepress.evaluation.speed import StepSeconds
from cachepress.generation.answering import Forced, force, generate
from cachepress.hf import has_only_full_attention
from cachepress.hf.types import Cache, PreTrainedModel, PreTrainedTokenizerBase
from cachepress.presses import BasePress

T = TypeVar("T")
R = TypeVar("R")
MOST_TOKENS = 64
"""Tokens of an answer over which a divergence is taken, at most."""


@dataclass(eq=False)
class Fork:
    """Compressed cache of a context under one press, with its bytes and seconds.

    Attributes:
        run: the evaluation that it belongs to; None for the uncompressed cache itself.
        cache: the cache.
        size: its bytes, and those of an uncompressed one.
        prefill_seconds: time of reading the context, compression included.
        press_seconds: time of it that the press added; None where nobody shared the reading.
        step: seconds of a decoded token, where they were measured.
    """

    run: Run | None
    cache: Cache
    size: CacheSize
    prefill_seconds: float
    press_seconds: float | None
    step: StepSeconds | None = None

    @property
    def acting(self) -> BasePress | None:
        """The press, if it compresses while answers are decoded."""
        press = None if self.run is None else self.run.press
        return press if press is not None and press.schedule.decodes else None


@dataclass(frozen=True)
class Reference:
    """Answers of the uncompressed model to each question, with its log-probabilities."""

    answers: list[list[int]]
    expected: list[Tensor]

    def parts(self) -> "list[Reference]":
        """Split the batch by question."""
        pairs = zip(self.answers, self.expected, strict=True)
        return [Reference([answer], [expected]) for answer, expected in pairs]


class Batch:
    """Forks of one context that are decoded together, each of them once for every question.

    Args:
        model: the model that read the context.
        tokenizer: its tokenizer.
        forks: what is decoded from; a single one if it compresses while answers are decoded.
        questions: token ids ``[1, q]`` of each question.
        text: token ids ``[1, T]`` of the context.

    Attributes:
        forks: the same, in the order in which answers come.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        forks: Sequence[Fork],
        questions: Sequence[Tensor],
        text: Tensor,
    ) -> None:
        self._model, self._tokenizer, self._questions = model, tokenizer, questions
        self._text = text
        groups = grouped([one.cache for one in forks])
        self._groups = [[forks[place] for place in group] for group in groups]
        self.forks = [one for group in self._groups for one in group]
        self._acting = forks[0].acting

    def answers(self, most: int) -> list[list[list[int]]]:
        """Generate the token ids of the answer of each fork to each question, ``most`` at most."""
        with self._acting(self._model, turns="first") if self._acting else nullcontext():
            return self._decoded(
                self._questions,
                lambda cache, ids: (
                    generate(
                        self._model, self._tokenizer, cache, ids, most, {}, text_ids=self._text
                    ).tokens
                ),
            )

    def reference(self, limits: Sequence[int]) -> Reference:
        """Answer from the first fork, whose cache is not compressed, to compare others with it."""
        answers = [
            tokens[: min(limit, MOST_TOKENS)]
            for tokens, limit in zip(self.answers(max(limits))[0], limits, strict=True)
        ]
        return Reference(answers, self._expected(answers)[0])

    def divergences(self, reference: Reference | None) -> list[list[float | None]]:
        """Compute the KL divergence of each fork and question from a reference, in nats a token.

        None without one, and under a press that acts while answers are decoded: it sees no given
        text.
        """
        if reference is None or self._acting is not None:
            return [[None] * len(self._questions) for _ in self.forks]
        return [
            [_divergence(p, q) for p, q in zip(reference.expected, found, strict=True)]
            for found in self._expected(reference.answers)
        ]

    def likelihoods(self, texts: Sequence[list[int]] | None) -> list[list[float | None]]:
        """Compute the mean negative log-likelihood of a text after each fork and question, in nats.

        None without texts, and under a press that acts while answers are decoded, as above.
        """
        if texts is None or self._acting is not None:
            return [[None] * len(self._questions) for _ in self.forks]
        return [
            [_nll(expected, text) for expected, text in zip(found, texts, strict=True)]
            for found in self._expected(texts)
        ]

    def _expected(self, texts: Sequence[list[int]]) -> list[list[Tensor]]:
        """Compute log-probabilities along given answers, after each fork (teacher forcing)."""
        forced = [Forced(ids, text) for ids, text in zip(self._questions, texts, strict=True)]
        return self._decoded(forced, lambda cache, some: force(self._model, cache, some))

    def _decoded(
        self, of_questions: Sequence[T], decode: Callable[[Cache, list[T]], list[R]]
    ) -> list[list[R]]:
        """Decode from each fork and question, as one batch, and sort the results by fork."""
        if not has_only_full_attention(self._model):
            # Sliding windows and recurrent states would count padding.
            (only,) = self.forks
            return [[decode(fork(only.cache), [one])[0] for one in of_questions]]
        spread = [x for group in self._groups for x in of_questions for _ in group]
        found, first, gathered = decode(fork(self._whole), spread), 0, []
        for size in map(len, self._groups):
            last = first + size * len(of_questions)
            gathered += [found[first:last][place::size] for place in range(size)]
            first = last
        return gathered

    @cached_property
    def _whole(self) -> Cache:
        """All forks as one cache, each once for every question."""
        groups, n = [[one.cache for one in group] for group in self._groups], len(self._questions)
        return fork(groups[0][0], n) if len(self.forks) == 1 else join(groups, n)


def _divergence(p: Tensor, q: Tensor) -> float:
    """Compute the mean KL divergence of log-probabilities ``q [n, vocabulary]`` from ``p``."""
    return float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0))


def _nll(expected: Tensor, answer: Sequence[int]) -> float:
    tokens = torch.tensor(list(answer), device=expected.device)
    return float(-expected[: len(tokens)].gather(-1, tokens[:, None]).mean())
