"""Names that an evaluation knows: presses, data sets and metrics."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from transformers import PreTrainedTokenizerBase

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.metrics import string_match
from cachepress.evaluation.prompts import Prompts, read_prompts
from cachepress.evaluation.tasks.aime25 import AIME25
from cachepress.evaluation.tasks.base import Metric, Task
from cachepress.evaluation.tasks.builtin import BUILTIN
from cachepress.evaluation.tasks.files import SUFFIXES, load_file
from cachepress.evaluation.tasks.infinitebench import INFINITEBENCH
from cachepress.evaluation.tasks.longbench import LONGBENCH, LONGBENCH_E, SUFFIX_E, uses_chat
from cachepress.evaluation.tasks.longbench_v2 import LONGBENCH_V2
from cachepress.evaluation.tasks.loogle import LOOGLE
from cachepress.evaluation.tasks.math500 import MATH500
from cachepress.evaluation.tasks.needle import NEEDLE
from cachepress.evaluation.tasks.perplexity import PERPLEXITY
from cachepress.evaluation.tasks.ruler import RULER
from cachepress.evaluation.tasks.scbench import SCBENCH
from cachepress.evaluation.tasks.zero_scrolls import ZERO_SCROLLS
from cachepress.pipeline import END
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
DATASET_REGISTRY: dict[str, Task] = {task.name: task for task in TASKS}


def _metrics(tasks: Iterable[Task]) -> dict[str, Metric]:
    found: dict[str, Metric] = {"string_match": string_match}
    for task in tasks:
        for name, metric in task.metrics.items():
            assert found.setdefault(name, metric) is metric, f"two metrics are named {name!r}"
    return found


METRIC_REGISTRY: dict[str, Metric] = _metrics(TASKS)
REPORTS = {metric: reports for task in TASKS for metric, reports in task.reports.items()}


def find_dataset(name: str) -> Task:
    """A registered data set, or a local file as one.

    Raises:
        CachepressError: if there is no such name or file.
    """
    if name in DATASET_REGISTRY:
        return DATASET_REGISTRY[name]
    if Path(name).suffix in SUFFIXES:
        return Task(name, "a local file", _load_local, takes_prompts=True)
    raise CachepressError(
        f"unknown dataset {name!r}: wanted {', '.join(DATASET_REGISTRY)}, or a file ending in "
        f"{', '.join(SUFFIXES)}"
    )


def _load_local(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """The rows of a file; those of a benchmark's tasks are asked as the benchmark asks them."""
    table = load_file(Path(config.dataset))
    if config.prompts is not None:
        table = _in_templates(table, read_prompts(config.prompts))
    rules = {name: _asked(str(name)) for name in set(table["task"])}
    for column, values in (("chat", 0), ("truncation", 1)):
        own = pd.Series([rules[name][values] for name in table["task"]], dtype=object)
        table[column] = table[column].where(table[column].notna(), own)
    return table


def _in_templates(table: pd.DataFrame, prompts: Prompts) -> pd.DataFrame:
    """The rows of a file in the templates of their tasks."""
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
    """A task of LongBench-E by the name that it has in LongBench."""
    return task.partition(" ")[0].removesuffix(SUFFIX_E)


def _asked(task: str) -> tuple[bool, str]:
    """Whether a benchmark's task is put into the chat template, and where contexts are cut."""
    name = task.partition(" ")[0].partition("/")[0]
    for benchmark in (LONGBENCH, LONGBENCH_E, INFINITEBENCH, LOOGLE, SCBENCH):
        if name in benchmark.parts:
            return uses_chat(name), benchmark.truncation
    return True, END
