"""Tokenises a context and its questions: chat template, limits, and truncation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cachepress.errors import CachepressError
from cachepress.hf import trained_length
from cachepress.limits import MOST_TOKENS, check_whole
from cachepress.models.chat import encode, template

MIDDLE, END = "middle", "end"
"""The values of ``truncation``: where a context that is too long is cut."""


@dataclass(frozen=True)
class PromptOptions:
    """Options of how a context and its questions are tokenised.

    Attributes:
        question: one question; exclusive with ``questions``.
        questions: several questions on the same context.
        answer_prefix: the beginning of answers, one text or one for each question; it is not part
            of the answer.
        max_new_tokens: most tokens of an answer, one number or one for each question.
        max_context_length: most tokens of a context; None for what the model has room for.
        truncation: where a longer context is cut instead of being refused: "middle" keeps as many
            tokens of the beginning as of the end of the whole prompt, with the shortest question
            counted in; "end" (or True) keeps those of the context's beginning.
        separator: text that is put where the context was cut.
        suffix: the end of the context that is never cut, such as a question that a press observes;
            it is tokenised apart, as questions are.
        enable_thinking: passed to the chat template.
        chat: whether context and questions are put into the model's chat template, if it has one.
        beyond_trained_length: allow contexts that are longer than the model was trained for, where
            its answers cannot be trusted.
        forced: a given answer for each question, for teacher forcing: there has to be room for it
            as well; it is not part of the prompt.
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
        """The most new tokens of each answer."""
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
        cut: number of tokens of the context that were cut.
    """

    context_ids: Tensor
    question_ids: list[Tensor]
    cut: int = 0


def make_prompt(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    context: str,
    options: PromptOptions,
) -> Prompt:
    """Tokenise a context and its questions for a model that is loaded."""
    positions = trained_length(model)
    return prompt_within(tokenizer, positions, context, options)


def prompt_within(
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    context: str,
    options: PromptOptions,
) -> Prompt:
    """Tokenise a context and its questions apart, for a number of positions.

    Apart, so that the tokens of the context, and with them its cache, do not depend on a question.

    Args:
        tokenizer: the model's tokenizer.
        positions: the most tokens that the model was trained for; None for any number.
        context: the text.
        options: the questions, and how they are tokenised.

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
    """Cut a context that is too long; return its token ids and how many were cut.

    The chat template's part before it and the suffix are kept. Benchmarks cut the middle of the
    whole prompt, so the suffix and the question behind it count as part of the second half.
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


def _room(positions: int | None, beside: int, options: PromptOptions) -> int:
    """Compute the most tokens of a context that go with ``beside`` of question and answer."""
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
