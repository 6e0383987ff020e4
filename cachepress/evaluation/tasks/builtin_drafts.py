"""Drafts of the built-in tasks: what each hides in a text, and what it asks."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, cycle, islice
from random import Random

from cachepress.evaluation.tasks.builtin_text import (
    NOUNS,
    distinct_nouns,
    made_up_words,
    ordinary_words,
    prose,
    repeated,
)

LEAST_KEYS = 4
VALUES = 4
LEAST_CHAINS = 2
HOPS = 3
TOP = 3
MADE_UP = 50

PHONE_INTRO = (
    "Read the text below and remember every phone number in it. Questions about the phone numbers "
    "follow later."
)
VARIABLE_INTRO = (
    "In the text below numbers are put into variables, and variables into other variables. "
    "Remember which variable holds which number."
)
WORD_INTRO = "Below is a long list of words. Remember which words occur most often."


@dataclass(frozen=True)
class Question:
    """Question about a context.

    Attributes:
        text: what is asked.
        answer: strings that all belong in the answer.
        prefix: how the answer begins.
        rest: how a perfect answer goes on.
        needle: the sentence that holds the answer; None if it is in several places.
    """

    text: str
    answer: list[str]
    prefix: str
    rest: str
    needle: str | None = None


@dataclass(frozen=True)
class Draft:
    """Context that is not cut to a length yet, with its questions.

    Attributes:
        write: makes the context from a number of filler words.
        least: fewest filler words for the task to make sense.
        questions: what is asked about the context.
    """

    write: Callable[[int], str]
    least: int
    questions: list[Question]


def single_repeat(rng: Random, depth: float, questions: int) -> Draft:
    """Draft a context with one phone number among a few repeated sentences."""
    return _single(rng, depth, repeated(rng))


def single_prose(rng: Random, depth: float, questions: int) -> Draft:
    """Draft a context with one phone number in prose."""
    return _single(rng, depth, prose(rng))


def _single(rng: Random, depth: float, filler: Iterator[str]) -> Draft:
    ((noun, number),) = pairs = _phone_book(rng, 1)
    return _hide(PHONE_INTRO, _phones(pairs), filler, depth, [_ask_phone(noun, number)])


def multi_key(rng: Random, depth: float, questions: int) -> Draft:
    """Draft a context with several phone numbers; each question asks for one of them."""
    pairs = _phone_book(rng, max(LEAST_KEYS, questions))
    asked = [_ask_phone(noun, number) for noun, number in rng.sample(pairs, questions)]
    return _hide(PHONE_INTRO, _phones(pairs), repeated(rng), depth, asked)


def multi_value(rng: Random, depth: float, questions: int) -> Draft:
    """Draft a context where one name has several phone numbers; the question asks for all."""
    noun, numbers = rng.choice(NOUNS), _numbers(rng, VALUES)
    question = Question(
        text=f"What are the {VALUES} phone numbers of the {noun}?",
        answer=numbers,
        prefix=f"The {VALUES} different phone numbers of the {noun} are:\n1.",
        rest=_numbered(numbers),
    )
    needles = _phones([(noun, number) for number in numbers])
    return _hide(PHONE_INTRO, needles, repeated(rng), depth, [question])


def multi_query(rng: Random, depth: float, questions: int) -> Draft:
    """Draft a context with several phone numbers; each question asks for two of them."""
    pairs = _phone_book(rng, max(LEAST_KEYS, questions))
    asked = [
        Question(
            text=f"What are the phone numbers of the {first} and of the {second}?",
            answer=[one, two],
            prefix=f"Phone numbers:\n- Phone number of the {first}:",
            rest=f" {one}\n- Phone number of the {second}: {two}",
        )
        for (first, one), (second, two) in rng.sample(list(combinations(pairs, 2)), questions)
    ]
    return _hide(PHONE_INTRO, _phones(pairs), repeated(rng), depth, asked)


def variable_tracking(rng: Random, depth: float, questions: int) -> Draft:
    """Draft chains of assignments; each question asks for all variables that hold a number."""
    numbers = _numbers(rng, max(LEAST_CHAINS, questions))
    names = iter(word.upper() for word in made_up_words(rng, len(numbers) * HOPS))
    chains = {number: list(islice(names, HOPS)) for number in numbers}
    asked = [
        Question(
            text=f"Which {HOPS} variables hold the number {number}? List them in order.",
            answer=chains[number],
            prefix=f"Put {number} into",
            rest=f" {' '.join(_puts(chains[number][0], chains[number][1:]))}",
        )
        for number in rng.sample(numbers, questions)
    ]
    return _hide(VARIABLE_INTRO, _interleaved(rng, chains), repeated(rng), depth, asked)


def common_words(rng: Random, depth: float, questions: int) -> Draft:
    """Draft a long list of words, three of which occur most often."""
    top = rng.sample(distinct_nouns(), TOP)
    others = rng.sample(ordinary_words(), len(ordinary_words()))

    def count(words: int) -> dict[str, int]:
        often = words // 8
        counts = dict.fromkeys(top, often) | dict.fromkeys(others, 0)
        for word in islice(cycle(others), words - TOP * often):
            counts[word] += 1
        return counts

    return _word_list(rng, count, 40, top)


def frequent_words(rng: Random, depth: float, questions: int) -> Draft:
    """Draft a text of made-up words with falling frequencies; the first three are asked for."""
    names = made_up_words(rng, MADE_UP)
    weights = [rank**-1.5 for rank in range(1, MADE_UP + 1)]

    def count(words: int) -> dict[str, int]:
        counts = [int(words * weight / sum(weights)) for weight in weights]
        counts[0] += words - sum(counts)
        return dict(zip(names, counts, strict=True))

    return _word_list(rng, count, 60, names[:TOP])


def _hide(
    intro: str,
    needles: Sequence[str],
    filler: Iterator[str],
    depth: float,
    questions: list[Question],
) -> Draft:
    """Hide each needle in its own equal part of the filler, at the same depth of each part."""
    sentences: list[str] = []
    ends = [0]

    def write(words: int) -> str:
        while ends[-1] < words:
            sentences.append(next(filler))
            ends.append(ends[-1] + len(sentences[-1].split()))
        whole = bisect_right(ends, words) - 1
        parts = sentences[:whole]
        if rest := words - ends[whole]:
            parts.append(" ".join(sentences[whole].split()[:rest]))
        for number in reversed(range(len(needles))):
            before = words * (number + depth) / len(needles)
            place = bisect_right(ends, before, hi=whole + 1) - 1
            parts.insert(place, f"{needles[number]} ")
        return f"{intro}\n\n{''.join(parts).rstrip()}\n\n"

    # With less filler than other words there would be nothing to hide in.
    return Draft(write, len(f"{intro} {' '.join(needles)}".split()), questions)


def _word_list(
    rng: Random, count: Callable[[int], Mapping[str, int]], least: int, top: list[str]
) -> Draft:
    seed = rng.random()

    def write(words: int) -> str:
        listed = [word for word, times in count(words).items() for _ in range(times)]
        Random(seed).shuffle(listed)
        return "\n".join([WORD_INTRO, "", *listed, "\n"])

    question = Question(
        text=f"Which {TOP} words occur most often in the list?",
        answer=top,
        prefix=f"The {TOP} words that occur most often are:\n1.",
        rest=_numbered(top),
    )
    return Draft(write, least, [question])


def _phone_book(rng: Random, size: int) -> list[tuple[str, str]]:
    return list(zip(rng.sample(NOUNS, size), _numbers(rng, size), strict=True))


def _numbers(rng: Random, size: int) -> list[str]:
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), size)]


def _phones(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [f"Phone number of the {noun}: {number}." for noun, number in pairs]


def _ask_phone(noun: str, number: str) -> Question:
    return Question(
        text=f"What is the phone number of the {noun}?",
        answer=[number],
        prefix=f"Phone number of the {noun}:",
        rest=f" {number}.",
        needle=f"Phone number of the {noun}: {number}.",
    )


def _puts(number: str, chain: Sequence[str]) -> list[str]:
    return [
        f"Put {source} into {target}."
        for source, target in zip([number, *chain], chain, strict=False)
    ]


def _interleaved(rng: Random, chains: Mapping[str, Sequence[str]]) -> list[str]:
    """Interleave the assignments of all chains; within a chain they keep their order."""
    puts = {number: iter(_puts(number, chain)) for number, chain in chains.items()}
    order = [number for number, chain in chains.items() for _ in chain]
    rng.shuffle(order)
    return [next(puts[number]) for number in order]


def _numbered(items: Sequence[str]) -> str:
    """Number a list whose "1." is there already."""
    return "".join(f"\n{i}. {item}" for i, item in enumerate(items, 1)).removeprefix("\n1.")
