"""Computes ROUGE-L as the package ``rouge`` defines it, for texts of any length.

The package itself walks back through both texts with a call for every word, so that what it says
of a long text would depend on how deep the call is that asks it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SMALLEST = 1e-8
"""What the package adds below the line of an F1."""


class Rouge(NamedTuple):
    """Recall, precision and F1, named as in the package ``rouge``."""

    r: float
    p: float
    f: float


def rouge_l(prediction: str, answer: str) -> Rouge:
    """Compute ROUGE-L by the distinct words of sentences' longest common subsequences.

    A sentence is what stands between full stops. A text without any scores nothing.
    """
    said, wanted = _sentences(prediction), _sentences(answer)
    if not said or not wanted:
        return Rouge(0.0, 0.0, 0.0)
    common = {
        word for sentence in wanted for other in said for word in _longest_common(sentence, other)
    }
    recall = len(common) / len({word for sentence in wanted for word in sentence})
    precision = len(common) / len({word for sentence in said for word in sentence})
    f1 = 2 * precision * recall / (precision + recall + SMALLEST)
    return Rouge(recall, precision, f1)


def _sentences(text: str) -> list[list[str]]:
    """Split a text into the words of each sentence; white space gives one empty word."""
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _longest_common(wanted: Sequence[str], said: Sequence[str]) -> list[str]:
    """Find a longest common subsequence; of several, the one that the package finds."""
    numbers = {word: number for number, word in enumerate(dict.fromkeys((*wanted, *said)))}
    x, y = (np.array([numbers[word] for word in words]) for words in (wanted, said))
    # Lengths in a row never fall, and each is at most one more than that above and before it.
    lengths = np.zeros((len(x) + 1, len(y) + 1), dtype=np.int32)
    for i, word in enumerate(x):
        grown = np.where(y == word, lengths[i, :-1] + 1, lengths[i, 1:])
        lengths[i + 1, 1:] = np.maximum.accumulate(grown)
    found, i, j = [], len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            found.append(wanted[i])
        elif lengths[i - 1, j] > lengths[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return found
