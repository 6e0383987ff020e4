"""Metrics that several benchmarks share; those of one benchmark stand in its module."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import cast

_MARKS = (
    *("\u2013\u2014", "\u2018\u2019", "\u201b\u201f", "\u2026\u2027", "\u3001\u3003"),
    *("\u300b\u3011", "\u3014\u301f", "\u3030\u3030", "\u303e\u303f", "\ufe4f\ufe4f"),
    *("\uff01\uff0d", "\uff0f\uff0f", "\uff1a\uff20", "\uff3b\uff40", "\uff5b\uff64"),
)
CHINESE_PUNCTUATION = frozenset(string.punctuation) | {
    chr(code) for first, last in _MARKS for code in range(ord(first), ord(last) + 1)
}
"""What scorers of Chinese answers ignore, as ranges from first to last."""


def string_match(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score the share of expected strings that the prediction contains, case ignored.

    Every text contains the empty one, which therefore only an empty prediction matches.
    """
    found = [answer.lower() in prediction.lower() for answer in answers if answer or not prediction]
    return sum(found) / len(answers)


def qa_f1(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Best F1 of words shared with one of the answers; articles and punctuation ignored."""
    return max((token_f1(_words(prediction), _words(answer)) for answer in answers), default=0.0)


def token_f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of the tokens that two sequences share, in whatever order."""
    shared = sum((Counter(prediction) & Counter(answer)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(answer)
    return 2 * precision * recall / (precision + recall)


def bleu(
    prediction: Sequence[str],
    answer: Sequence[str],
    weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
    smooth: bool = False,
) -> float:
    """BLEU of a sequence of tokens against a reference, as nltk computes it.

    Args:
        prediction: tokens of the prediction.
        answer: tokens of the reference.
        weights: what sequences of one, two, ... tokens count.
        smooth: whether sizes without a match count a little (Chen and Cherry's fourth method).
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method4 if smooth else None
    return cast(float, sentence_bleu([answer], prediction, weights, smoothing))


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
