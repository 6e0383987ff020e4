"""Registries of presses, data sets and metrics by name."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.metrics import string_match
from cachepress.evaluation.prompts import Prompts, read_prompts
from cachepress.evaluation.tasks.aime25 import AIME25
from cachepress.evaluation.tasks.base import PERPLEXITY as FORCED
from cachepress.evaluation.tasks.base import UNSCORED, Metric, Task
from cachepress.evaluation.tasks.builtin import BUILTIN
from cachepress.evaluation.tasks.files import SUFFIXES, load_file
from cachepress.evaluation.tasks.fits import Fits, some_answer
from cachepress.evaluation.tasks.infinitebench import INFINITEBENCH
from cachepress.evaluation.tasks.longbench import LONGBENCH, LONGBENCH_E, SUFFIX_E, uses_chat
from cachepress.evaluation.tasks.longbench_v2 import LONGBENCH_V2
from cachepress.evaluation.tasks.loogle import LOOGLE
from cachepress.evaluation.tasks.math500 import MATH500
from cachepress.evaluation.tasks.needle import NEEDLE
from cachepress.evaluation.tasks.perplexity import PERPLEXITY
from cachepress.evaluation.tasks.ruler import RULER
from cachepress.evaluation.tasks.scbench import SCBENCH
from cachepress.evaluation.tasks.zero_scrolls import ZERO_SCROLLS, submit_if_ours
from cachepress.generation.prompt import END
from cachepress.hf.types import PreTrainedTokenizerBase
from cachepress.spec import NO_PRESS, aliases

PRESS_REGISTRY: dict[str, str] = {
    NO_PRESS: NO_PRESS,
    **{alias: kind.__name__ for alias, kind in aliases().items()},
}
TASKS: tuple[Task, ...] = (
    BUILTIN,
    NEEDLE,
    PERPLEXITY,
    RULER,
    LONGBENCH,
    LONGBENCH_E,
    LONGBENCH_V2,
    INFINITEBENCH,
    LOOGLE,
    SCBENCH,
    ZERO_SCROLLS,
    AIME25,
    MATH500,
)
_SHOWN = 80
DATASET_REGISTRY: dict[str, Task] = {task.name: task for task in TASKS}


def _metrics(tasks: Iterable[Task]) -> dict[str, Metric]:
    found: dict[str, Metric] = {"string_match": string_match}
    for task in tasks:
        for name, metric in task.metrics.items():
            assert found.setdefault(name, metric) is metric, f"two metrics are named {name!r}"
    return found


METRIC_REGISTRY: dict[str, Metric] = _metrics(TASKS)
REPORTS = {metric: reports for task in TASKS for metric, reports in task.reports.items()}
METRIC_FITS: dict[str, Fits] = {name: fits for t in TASKS for name, fits in t.fits.items()}
UNJUDGED = (UNSCORED, FORCED)
"""What stands in the place of a metric where none judges."""


def find_metric(name: str) -> Metric:
    """Look up a metric by name.

    Raises:
        CachepressError: if there is no such name.
    """
    if name not in METRIC_REGISTRY:
        raise CachepressError(
            f"unknown metric {name!r}: wanted one of {', '.join(sorted(METRIC_REGISTRY))}"
        )
    return METRIC_REGISTRY[name]


def check_metric(
    name: str, answers: Sequence[str], choices: Sequence[str], trial: bool = True
) -> None:
    """Raise CachepressError if a metric does not fit the answers of a sample.

    Args:
        name: name of the metric.
        answers: accepted texts.
        choices: all classes.
        trial: whether to score an empty prediction too, which takes a moment with some metrics.

    Raises:
        CachepressError: if there is no such metric, or it does not fit.
    """
    metric = find_metric(name)
    wanted = METRIC_FITS.get(name, some_answer)(answers, choices)
    if wanted is None and trial:
        try:
            metric("", answers, choices)
        except (ValueError, TypeError, IndexError, KeyError, ArithmeticError) as error:
            wanted = f"answers that it can read ({error})"
    if wanted is not None:
        got = f"{list(answers)!r}"[:_SHOWN]
        raise CachepressError(
            f"metric {name!r} does not fit the answer {got}: wanted {wanted}; choose another with "
            "--metric"
        )


def find_dataset(name: str) -> Task:
    """Look up a data set by name, or make one of a local file.

    Raises:
        CachepressError: if there is no such name or file.
    """
    if name in DATASET_REGISTRY:
        return DATASET_REGISTRY[name]
    if Path(name).suffix in SUFFIXES:
        return Task(name, "a local file", _load_local, takes_prompts=True, submit=submit_if_ours)
    raise CachepressError(
        f"unknown dataset {name!r}: wanted {', '.join(DATASET_REGISTRY)}, or a file ending in "
        f"{', '.join(SUFFIXES)}"
    )


def _load_local(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Load a local file; rows of a benchmark's tasks follow its rules of chat and truncation."""
    table = load_file(Path(config.dataset))
    if config.prompts is not None:
        table = _in_templates(table, read_prompts(config.prompts))
    rules = {name: _asked(str(name)) for name in set(table["task"])}
    for column, values in (("chat", 0), ("truncation", 1)):
        own = pd.Series([rules[name][values] for name in table["task"]], dtype=object)
        table[column] = table[column].where(table[column].notna(), own)
    return table


def _in_templates(table: pd.DataFrame, prompts: Prompts) -> pd.DataFrame:
    """Put the rows of a file into the user's templates, by task."""
    if prompts.rows:
        return table
    needs = [("question", "input")] if any(table["question"]) else []
    templates = {
        name: prompts.template((name, _bare(str(name))), needs=needs) for name in set(table["task"])
    }
    columns = zip(table["task"], table["context"], table["question"], strict=True)
    asked = [
        templates[task].around(context, {"question": question, "input": question})
        for task, context, question in columns
    ]
    texts = pd.DataFrame(asked, columns=["context", "question"], index=table.index)
    return table.assign(**texts, answer_prefix="")


def _bare(task: str) -> str:
    """Return the LongBench name of a task of LongBench-E."""
    return task.partition(" ")[0].removesuffix(SUFFIX_E)


def _asked(task: str) -> tuple[bool, str]:
    """Return whether a task is put into the chat template, and where its contexts are cut."""
    name = task.partition(" ")[0].partition("/")[0]
    for benchmark in (LONGBENCH, LONGBENCH_E, INFINITEBENCH, LOOGLE, SCBENCH):
        if name in benchmark.parts:
            return uses_chat(name), benchmark.truncation
    return True, END
