r"""Problems of mathematics whose answer stands in ``\boxed{}``."""

import re
from collections.abc import Sequence

import pandas as pd

from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.prompts import read_prompts
from cachepress.evaluation.tasks.sources import Hub, in_format, read_rows


def read_problems(
    config: EvaluationConfig, names: Sequence[str], hub: Hub, prompt: str, title: str
) -> pd.DataFrame:
    """Read problems and answers from the benchmark's own file.

    Args:
        config: says which folder has that file, and the prompts if they are the user's.
        names: names that it may have.
        hub: where the hub has it.
        prompt: what is asked, with ``{problem}``.
        title: the benchmark, for errors.

    Raises:
        CachepressError: if the file is not to be had, or is in another format.
    """
    rows, template = read_rows(config.data_path, names, hub), None
    if config.prompts is not None:
        tasks = (config.dataset, title)
        template = read_prompts(config.prompts).template(tasks, ("problem", "question", "context"))

    def asked_of(problem: str) -> str:
        texts = template.around(problem, {}) if template else [prompt.format(problem=problem)]
        return "".join(texts)

    with in_format(names[0], f"{title}'s"):
        asked = {
            "context": [asked_of(row["problem"].strip()) for row in rows],
            "answer": [[str(row["answer"])] for row in rows],
        }
    return pd.DataFrame({**asked, "question": "", "row": rows})


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{}``; None if there is none or it has no end."""
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
