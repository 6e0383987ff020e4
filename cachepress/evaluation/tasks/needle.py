"""Needle in a haystack: one sentence hidden in a text, over a grid of lengths and depths.

The test is Greg Kamradt's (2023); haystacks, needles and questions are our own. Nothing is
downloaded, and a seed always gives the same table for the same tokenizer and haystack.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from pathlib import Path
from random import Random

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.metrics import string_match
from cachepress.evaluation.tasks.base import RowCheck, Size, Task, normalise, whole_number
from cachepress.evaluation.tasks.builtin_text import NOUNS, prose
from cachepress.hf.types import PreTrainedTokenizerBase
from cachepress.limits import said

DEFAULT_GRID = "1000,2000,4000,7000x5"
"""Fits a model with 8192 positions, question and answer included."""
KINDS = {"sentence": "string_match", "number": "string_match", "rouge": "rouge_1_recall"}
"""What is hidden, and the metric of the answer; "rouge" hides a sentence too."""
INTRODUCTION = (
    "Read the text below with care. A question about one detail of it comes after it.\n\n"
)
ASK = "\n\nWhat is the {secret} of the {owner}? Answer with what the text says about it."
WORDS = (
    "crimson golden ivory lilac orange purple scarlet silver turquoise yellow",
    "accordion gramophone kettle lantern parasol pineapple teapot telescope trombone umbrella",
    "bathtub bridge carpet chimney doormat fountain hedge mattress oak piano sofa staircase",
)
"""Colours, things and places."""
MOST_CELLS = {"sentence": 10_000, "number": 1_000_000, "rouge": 10_000}
"""Needles are drawn until one is new, which stays quick for a small part of all there are."""
PIECE = re.compile(r"\S.*?(?:[.!?][\"')\u201d]*\s+|[\u3002\uff01\uff1f]\s*|\n\s*)")
"""A sentence or a line, with the white space after it."""
FEWEST_PIECES = 64
SPARE_ANSWER = 8
LEAST_LIMIT = 2 + SPARE_ANSWER
SPARE = 16
"""Pieces of text that an exact length may need besides those that fill it."""
FAR = 8
"""Characters around the likeliest cut that are tried as well."""
Count = Callable[[str], int]


@dataclass(frozen=True)
class Needle:
    """Hidden sentence, and the question about it.

    Attributes:
        question: what is asked.
        start: how the sentence begins; the answer begins in the same way.
        rest: how it goes on.
        keys: words that the answer has to contain.
    """

    question: str
    start: str
    rest: str
    keys: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The sentence with its answer."""
        return f"{self.start} {self.rest}"


def load_needle(
    config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, check: RowCheck | None = None
) -> pd.DataFrame:
    """Generate a sample for each length and depth that the config names.

    ``data_dir`` is lengths and a number of depths such as "1000,2000x5", a kind out of ``KINDS``,
    or both, such as "number-1000,2000x5". ``data_path`` is a folder of .txt files to hide needles
    in; without it the haystack is prose out of the documentation that Python ships.

    A context has exactly "length" tokens, without the tokenizer's own special tokens. "depth" runs
    from 0, the needle before all of the haystack, to 1, the needle after it; between these the
    needle stands at the end of the sentence that is nearest. ``check`` checks each row as soon as
    it is generated.

    Raises:
        CachepressError: if the grid is misspelt or a length too small, or there is no text.
    """
    kind, lengths, number = _grid(config.data_dir)
    pieces = None if config.data_path is None else _pieces(Path(config.data_path))

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    rows, seen = [], set()
    for length in lengths:
        source = cycle(pieces) if pieces else prose(Random(f"{config.seed}/{length}"))
        haystack = _haystack(source, length, count)
        for depth in _depths(number):
            needle = _fresh(kind, Random(f"{config.seed}/{kind}/{length}/{depth}"), seen)
            context = _context(haystack, needle.sentence, length, depth, count)
            rows.append(_row(kind, needle, context, length, depth, count))
            if check is not None:
                check(rows[-1:])
    return normalise(pd.DataFrame(rows), task=f"needle-{kind}", origin="needle")


def _grid(data_dir: str | None) -> tuple[str, list[int], int]:
    """Parse the config's part: what is hidden, the lengths, and the number of depths."""
    kind, _, grid = (data_dir or DEFAULT_GRID).rpartition("-")
    if grid in KINDS and not kind:
        kind, grid = grid, DEFAULT_GRID
    kind = kind or "sentence"
    found = re.fullmatch(r"([0-9]+(?:,[0-9]+)*)x([0-9]+)", grid)
    if kind not in KINDS or found is None or whole_number(found[2]) < 1:
        raise CachepressError(
            f"needle: got data_dir={data_dir!r}, wanted lengths x number of depths, such as "
            f"{DEFAULT_GRID}, with {', '.join(f'{name}-' for name in KINDS)} or nothing before it"
        )
    lengths = dict.fromkeys(map(whole_number, found[1].split(",")))
    return kind, list(lengths), whole_number(found[2])


def _depths(number: int) -> list[float]:
    return [i / (number - 1) for i in range(number)] if number > 1 else [0.5]


def _size(config: EvaluationConfig) -> Size:
    kind, lengths, number = _grid(config.data_dir)
    if (cells := len(lengths) * number) > MOST_CELLS[kind]:
        raise CachepressError(
            f"needle: got a grid of {cells:.3g} needles, and there are only so many that differ: "
            f"wanted at most {MOST_CELLS[kind]}"
        )
    asked = 1 + (config.max_new_tokens or LEAST_LIMIT)
    return Size(max(lengths), sum(lengths) * number, asked, min(lengths))


def _pieces(folder: Path) -> list[str]:
    """Split a folder's .txt files, in the order of their names, into sentences and lines.

    Each has the white space after it.
    """
    try:
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    except (OSError, UnicodeDecodeError) as error:
        raise CachepressError(f"{folder}: a .txt file cannot be read: {said(error)}") from error
    text = "\n\n".join(text.strip() for text in texts if text.strip())
    if not text:
        raise CachepressError(f"{folder} has no .txt file with text to hide a needle in")
    return PIECE.findall(f"{text}\n")


def _haystack(source: Iterator[str], length: int, count: Count) -> list[str]:
    """Collect enough pieces of text for a context of that length."""
    pieces = list(islice(source, FEWEST_PIECES))
    while count("".join(pieces)) < length:
        pieces += islice(source, len(pieces))
    return [*pieces, *islice(source, SPARE)]


def _fresh(kind: str, rng: Random, seen: set[str]) -> Needle:
    """Draw a needle that no other sample has."""
    make = _number if kind == "number" else _sentence
    while (needle := make(rng)).sentence in seen:
        pass
    seen.add(needle.sentence)
    return needle


def _sentence(rng: Random) -> Needle:
    keys = tuple(rng.choice(words.split()) for words in WORDS)
    article = "an" if keys[0][0] in "aeiou" else "a"
    rest = f"{article} {keys[0]} {keys[1]} under the {keys[2]}."
    return _needle("best kept secret", rng.choice(NOUNS), rest, keys)


def _number(rng: Random) -> Needle:
    number = str(rng.randrange(1_000_000, 10_000_000))
    return _needle("secret number", rng.choice(NOUNS), f"{number}.", (number,))


def _needle(secret: str, owner: str, rest: str, keys: tuple[str, ...]) -> Needle:
    question = ASK.format(secret=secret, owner=owner)
    return Needle(question, f"The {secret} of the {owner} is", rest, keys)


def _context(haystack: Sequence[str], needle: str, length: int, depth: float, count: Count) -> str:
    """Build a context of the exact length: introduction, haystack, and the needle in it."""

    def size(pieces: int) -> int:
        return count(_hide(haystack[:pieces], 0, needle, depth))

    if (least := size(1)) > length:
        raise CachepressError(f"needle: got length {length}, wanted at least {least} tokens")
    fewest = bisect_left(range(len(haystack)), length, key=size)
    # A character may be several tokens: where no beginning fits, another end moves them all.
    for pieces in range(fewest, fewest + SPARE):
        context = _cut(haystack[:pieces], needle, length, depth, count)
        if context is not None:
            return context
    raise CachepressError(f"needle: no context has exactly {length} tokens with this tokenizer")


def _cut(pieces: Sequence[str], needle: str, length: int, depth: float, count: Count) -> str | None:
    """Cut the haystack's beginning to exactly ``length`` tokens; None if no cut gives them."""
    cuts = range(len("".join(pieces)))
    near = bisect_left(cuts, -length, key=lambda cut: -count(_hide(pieces, cut, needle, depth)))
    for cut in cuts[max(0, near - FAR) : near + FAR]:
        context = _hide(pieces, cut, needle, depth)
        if count(context) == length:
            return context
    return None


def _hide(pieces: Sequence[str], cut: int, needle: str, depth: float) -> str:
    text = "".join(pieces)
    cut = len(text) - len(text[cut:].lstrip())
    text = text[cut:].rstrip()
    ends = [0, *(end - cut for end in accumulate(map(len, pieces)) if cut < end), len(text)]
    place = min(ends, key=lambda end: abs(end - depth * len(text)))
    before, after = text[:place], text[place:]
    space = " " if before and not before[-1].isspace() else ""
    return f"{INTRODUCTION}{before}{space}{needle} {after}".rstrip()


def _row(
    kind: str, needle: Needle, context: str, length: int, depth: float, count: Count
) -> dict[str, object]:
    return {
        "context": context,
        "question": needle.question,
        "answer": [needle.rest] if kind == "rouge" else list(needle.keys),
        "answer_prefix": needle.start,
        "max_new_tokens": 2 * count(needle.rest) + SPARE_ANSWER,
        "metric": KINDS[kind],
        "length": length,
        "depth": depth,
    }


def rouge_1_recall(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score the share of an answer's word stems that the prediction has; of the best answer."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    return max(scorer.score(answer, prediction)["rouge1"].recall for answer in answers)


NEEDLE = Task(
    name="needle",
    about="one sentence in a haystack, by length and depth; generated (Kamradt, 2023)",
    load=load_needle,
    size=_size,
    load_checked=load_needle,
    metrics={"string_match": string_match, "rouge_1_recall": rouge_1_recall},
)
