"""Checks that the answers and choices of a sample fit its metric.

A check says what was wanted, or None where the metric fits.
"""

import json
import re
from collections.abc import Callable, Sequence

Fits = Callable[[Sequence[str], Sequence[str]], str | None]
"""``(answers, choices)`` -> what was wanted; None if the metric fits."""


def some_answer(answers: Sequence[str], choices: Sequence[str]) -> str | None:
    """Require any text to compare with, as every metric does."""
    return None if answers else "an answer"


def some_choices(answers: Sequence[str], choices: Sequence[str]) -> str | None:
    """Require all classes, in the column "choices" or "all_classes"."""
    return None if choices else 'all classes, in a column "choices" or "all_classes"'


def listed_choice(answers: Sequence[str], choices: Sequence[str]) -> str | None:
    """Require an answer that is one of the choices."""
    fits = not set(answers).isdisjoint(choices)
    return None if fits else 'choices, in a column "choices", with the answer among them'


def some_letter(answers: Sequence[str], choices: Sequence[str]) -> str | None:
    """Require the letter of an option, with its text or without."""
    return None if any(a in tuple("ABCD") for a in answers) else "a letter from A to D"


def text_and_letter(answers: Sequence[str], choices: Sequence[str]) -> str | None:
    """Require the text of an option, and then its letter."""
    fits = len(answers) == 2 and re.fullmatch("[A-J]", answers[1])
    return None if fits else "two texts, what the right option says and its letter"


def matching(pattern: str, wanted: str, every: bool = True) -> Fits:
    """Require answers that a pattern matches as a whole.

    Args:
        pattern: the pattern.
        wanted: what it matches, in words.
        every: whether all answers have to match, or the first that is looked at.
    """
    form = re.compile(pattern, re.DOTALL)

    def check(answers: Sequence[str], choices: Sequence[str]) -> str | None:
        looked_at = answers if every else answers[:1]
        fits = bool(looked_at) and all(form.fullmatch(answer) for answer in looked_at)
        return None if fits else wanted

    return check


def mapping(answers: Sequence[str], choices: Sequence[str]) -> str | None:
    """Require a mapping from masks to names, as JSON."""
    try:
        value = json.loads(answers[0])
    except (ValueError, IndexError, RecursionError):
        value = None
    fits = isinstance(value, dict) and value and all(isinstance(v, str) for v in value.values())
    return None if fits else "a mapping from masks to names in JSON"


whole = matching("[0-9]+", "a whole number", every=False)
signed = matching("[+-]?[0-9]+", "a whole number", every=False)
several = matching("-?[0-9]+", "whole numbers")
number = matching(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", "a number", every=False)
