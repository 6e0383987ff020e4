"""Words and sentences that the built-in tasks are made of."""

import re
from collections.abc import Iterator
from functools import cache
from itertools import cycle, islice
from pydoc_data import topics
from random import Random

_NOUNS = (
    "airport aquarium bakery bank barber brewery butcher carpenter castle cathedral cinema circus "
    "clinic college cottage dairy dentist embassy factory farmer ferry florist gallery garage "
    "gardener grocer harbour hospital hostel hotel jeweller kitchen laundry lawyer library "
    "lighthouse locksmith magician mechanic monastery museum newspaper nursery observatory office "
    "opera optician orchard painter palace pharmacy photographer plumber police prison restaurant "
    "school sculptor shepherd stadium station tailor teacher temple theatre tower university "
    "village vineyard wizard workshop zoo"
)
NOUNS = tuple(_NOUNS.split())
REPEATED = (
    "A light rain falls on the roof.",
    "The clock in the hall ticks slowly.",
    "Someone makes tea.",
    "The dog sleeps by the door.",
    "Nothing else happens today.",
)
LONGEST_WORD = 16


def repeated(rng: Random) -> Iterator[str]:
    """Yield a few filler sentences again and again, each with a space after it."""
    start = rng.randrange(len(REPEATED))
    yield from (f"{sentence} " for sentence in islice(cycle(REPEATED), start, None))


def prose(rng: Random) -> Iterator[str]:
    """Yield prose without end, from a random paragraph on.

    Each sentence has a space after it, or an empty line at the end of a paragraph.
    """
    paragraphs = prose_paragraphs()
    start = rng.randrange(len(paragraphs))
    for paragraph in cycle(paragraphs[start:] + paragraphs[:start]):
        yield from (f"{sentence} " for sentence in paragraph[:-1])
        yield f"{paragraph[-1]}\n\n"


@cache
def prose_paragraphs() -> tuple[tuple[str, ...], ...]:
    """Extract paragraphs of plain sentences from the documentation that Python ships.

    Code, tables, lists, and sentences with digits, unusual characters or very long words are left
    out; no sentence comes twice. The text differs a little between versions of Python.
    """
    seen: set[str] = set()
    paragraphs = []
    for name in sorted(topics.topics):
        for block in re.split(r"\n\s*\n", topics.topics[name]):
            fresh = tuple(s for s in _plain_sentences(block) if s not in seen)
            seen.update(fresh)
            if fresh:
                paragraphs.append(fresh)
    return tuple(paragraphs)


def _plain_sentences(block: str) -> list[str]:
    text = " ".join(re.sub(r"[\"*`]", "", block).split())
    text = re.sub(r"(?<=[a-z])- (?=[a-z])", "-", text)
    # A block that does not read as whole sentences is a heading, a grammar rule or a table.
    if not re.fullmatch(r"[A-Z].*\.", text):
        return []
    sentences = re.split(r"(?<=\.) (?=[A-Z])", text)
    return [s for s in dict.fromkeys(sentences) if _is_plain(s)]


def _is_plain(sentence: str) -> bool:
    words = sentence.split()
    plain = re.fullmatch(r"[A-Z][A-Za-z ,;:()'\u2019\u201c\u201d.-]*\.", sentence)
    return plain is not None and len(words) >= 6 and max(map(len, words)) <= LONGEST_WORD


@cache
def ordinary_words() -> tuple[str, ...]:
    """List the lower-case words of 4 to 9 letters in the prose, in alphabetical order."""
    text = " ".join(sentence for paragraph in prose_paragraphs() for sentence in paragraph)
    return tuple(sorted(set(re.findall(r"(?<![\w.-])[a-z]{4,9}(?![\w-])", text))))


@cache
def distinct_nouns() -> tuple[str, ...]:
    """List nouns that are not in the ordinary words, not even as a part of one."""
    text = " ".join(ordinary_words())
    return tuple(noun for noun in NOUNS if noun not in text)


def made_up_words(rng: Random, number: int) -> list[str]:
    """Make up different words of three open syllables, in lower case."""
    words: dict[str, None] = {}
    while len(words) < number:
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        words["".join(syllables)] = None
    return list(words)
