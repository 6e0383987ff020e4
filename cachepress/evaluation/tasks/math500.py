"""MATH-500: 500 problems of MATH (Hendrycks et al., 2021, arXiv:2103.03874).

The selection is that of "Let's Verify Step by Step" (Lightman et al., 2023, arXiv:2305.20050).
"""

import threading
from collections.abc import Sequence

import pandas as pd

from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.tasks.base import Task, normalise
from cachepress.evaluation.tasks.boxed import last_boxed, read_problems
from cachepress.evaluation.tasks.sources import Hub, in_format
from cachepress.hf.types import PreTrainedTokenizerBase

HUB = Hub("HuggingFaceH4/MATH-500", "test.jsonl")
NAMES = ("math500.jsonl", "test.jsonl")
MAX_NEW_TOKENS = 4096
PROMPT = (
    "Solve this problem step by step. End with the answer alone, in LaTeX and as simple as it can "
    "be, inside \\boxed{{}}.\n\n{problem}"
)
SECONDS = 5


def load_math500(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Load the problems, with subjects as tasks, from the benchmark's own file.

    Raises:
        CachepressError: if the file is not to be had, or is in another format.
    """
    table = read_problems(config, NAMES, HUB, PROMPT, "MATH-500")
    with in_format(NAMES[0], "MATH-500's"):
        subjects = [row["subject"] for row in table["row"]]
    table = table.assign(max_new_tokens=MAX_NEW_TOKENS, task=subjects, metric="math_verify")
    return normalise(table, task="math500", origin=NAMES[0])


def math_verify(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    r"""Score 1 if the last ``\boxed{}`` is mathematically equal to an answer, else 0."""
    from math_verify import LatexExtractionConfig, parse, verify

    found = last_boxed(prediction)
    if found is None:
        return 0.0
    # The time limit is a signal, which only the main thread can have.
    alone = threading.current_thread() is threading.main_thread()
    seconds = SECONDS if alone else 0
    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", config, parsing_timeout=seconds)

    return float(
        any(verify(read(answer), read(found), timeout_seconds=seconds) for answer in answers)
    )


MATH500 = Task(
    name="math500",
    about="problems of mathematics contests, 500 of MATH (arXiv:2103.03874)",
    load=load_math500,
    takes_prompts=True,
    metrics={"math_verify": math_verify},
    official={"math500": "math_verify"},
)
