"""AIME 2025: the thirty problems of a contest, each with a whole number as its answer."""

import re
from collections.abc import Sequence

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.tasks.base import Task, normalise
from cachepress.evaluation.tasks.boxed import last_boxed, read_problems
from cachepress.evaluation.tasks.fits import matching
from cachepress.evaluation.tasks.math500 import math_verify
from cachepress.evaluation.tasks.sources import Hub
from cachepress.hf.types import PreTrainedTokenizerBase

HUB = Hub("math-ai/aime25", "test.jsonl")
NAMES = ("aime25.jsonl", "test.jsonl")
MAX_NEW_TOKENS = 32768
"""Reasoning models need as many; ``max_new_tokens`` lowers it for a model with less room."""
PROMPT = (
    "Solve this problem step by step. Its answer is a whole number from 0 to 999. End with that "
    "number inside \\boxed{{}}.\n\n{problem}"
)
NUMBER = re.compile(r"\s*\$?\s*([0-9]+)\s*(?:\^\s*\{?\s*\\circ\s*\}?|\u00b0)?\s*\$?\s*")
"""A whole number, which may be an angle in degrees."""


def load_aime25(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Load the problems from the benchmark's own file.

    Raises:
        CachepressError: if the file is not to be had, or is in another format.
    """
    table = read_problems(config, NAMES, HUB, PROMPT, "AIME25")
    table = table.assign(max_new_tokens=MAX_NEW_TOKENS, metric="boxed_integer")
    for number, (answer,) in enumerate(table["answer"]):
        if NUMBER.fullmatch(answer) is None:
            raise CachepressError(
                f"{NAMES[0]}, row {number}: the answer {answer!r} is not a whole number"
            )
    return normalise(table, task="aime25", origin=NAMES[0])


def boxed_integer(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    r"""Score 1 if the last ``\boxed{}`` holds the same whole number as an answer, else 0.

    It may be written in any way that MATH-500 accepts, such as ``\text{70}`` or ``n = 70``.
    """
    found = NUMBER.fullmatch(last_boxed(prediction) or "")
    if found is None:
        return math_verify(prediction, answers)
    wanted = [NUMBER.fullmatch(answer) for answer in answers]
    digits = [match[1].lstrip("0") for match in wanted if match is not None]
    return float(found[1].lstrip("0") in digits)


AIME25 = Task(
    name="aime25",
    about="problems of the American Invitational Mathematics Examination of 2025",
    load=load_aime25,
    takes_prompts=True,
    metrics={"boxed_integer": boxed_integer},
    fits={"boxed_integer": matching(NUMBER.pattern, "a whole number")},
    official={"aime25": "boxed_integer"},
)
