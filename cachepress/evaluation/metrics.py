"""Scores of answers that several benchmarks share; those of one stand beside its loader."""

import re
import string
from collections import Counter
from collections.abc import Sequence


def string_match(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Share of the expected strings that the prediction contains, case ignored."""
    found = [answer.lower() in prediction.lower() for answer in answers]
    return sum(found) / len(found)


def qa_f1(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Best F1 of words shared with one of the answers; articles and punctuation ignored."""
    return max((_f1(_words(prediction), _words(answer)) for answer in answers), default=0.0)


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(prediction: list[str], answer: list[str]) -> float:
    shared = sum((Counter(prediction) & Counter(answer)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(answer)
    return 2 * precision * recall / (precision + recall)
