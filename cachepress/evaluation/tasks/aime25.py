"""AIME 2025: the thirty problems of a contest, each with a whole number as its answer."""

import re
from collections.abc import Sequence

import pandas as pd
from transformers import PreTrainedTokenizerBase

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.tasks.base import Task, normalise
from cachepress.evaluation.tasks.sources import Hub, read_rows

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
    """The problems, from the benchmark's own file.

    Raises:
        CachepressError: if the file is not to be had, or is in another format.
    """
    rows = read_rows(config.data_path, NAMES, HUB)
    try:
        table = pd.DataFrame(
            {
                "context": [PROMPT.format(problem=row["problem"].strip()) for row in rows],
                "question": "",
                "answer": [[str(row["answer"])] for row in rows],
                "max_new_tokens": MAX_NEW_TOKENS,
                "metric": "boxed_integer",
            }
        )
    except (KeyError, AttributeError) as error:
        raise CachepressError(f"{NAMES[0]} is not in AIME25's format: {error!r}") from error
    for number, (answer,) in enumerate(table["answer"]):
        if NUMBER.fullmatch(answer) is None:
            raise CachepressError(
                f"{NAMES[0]}, row {number}: the answer {answer!r} is not a whole number"
            )
    return normalise(table, task="aime25", origin=NAMES[0])


def last_boxed(text: str) -> str | None:
    r"""What stands inside the last ``\boxed{}``; None if there is none or it has no end."""
    starts = list(re.finditer(r"boxed\s*\{", text))
    if not starts:
        return None
    start, depth = starts[-1].end(), 1
    # An escaped brace is a sign on the page and closes nothing.
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[start : start + brace.start()]
    return None


def boxed_integer(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 if the last box holds the same whole number as an answer, else 0."""
    found = NUMBER.fullmatch(last_boxed(prediction) or "")
    if found is None:
        return 0.0
    wanted = [NUMBER.fullmatch(answer) for answer in answers]
    digits = [match[1].lstrip("0") for match in wanted if match is not None]
    return float(found[1].lstrip("0") in digits)


AIME25 = Task(
    name="aime25",
    about="problems of the American Invitational Mathematics Examination of 2025",
    load=load_aime25,
    metrics={"boxed_integer": boxed_integer},
)
