"""Recognises tables of benchmarks that others have converted, by their tasks and columns.

kvpress converts benchmarks to tables with the columns context, question, answer_prefix, answer or
answers, max_new_tokens and mostly task, some with columns of the benchmark besides. They are read
as they are; what a row lacks is the metric, and its task's name brings the official one.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from cachepress.evaluation.tasks.aime25 import AIME25
from cachepress.evaluation.tasks.base import UNSCORED, Task
from cachepress.evaluation.tasks.infinitebench import INFINITEBENCH
from cachepress.evaluation.tasks.longbench import (
    LONGBENCH,
    LONGBENCH_E,
    PROMPTS,
    SUFFIX_E,
    TASKS_E,
    bucket,
)
from cachepress.evaluation.tasks.longbench_v2 import LETTERS, LONGBENCH_V2
from cachepress.evaluation.tasks.loogle import LOOGLE
from cachepress.evaluation.tasks.math500 import MATH500
from cachepress.evaluation.tasks.ruler import RULER
from cachepress.evaluation.tasks.zero_scrolls import MAX_NEW_TOKENS as ZERO_SCROLLS_TASKS
from cachepress.evaluation.tasks.zero_scrolls import SEPARATOR, ZERO_SCROLLS

logger = logging.getLogger(__name__)
TASKS: tuple[Task, ...] = (
    RULER,
    LONGBENCH,
    LONGBENCH_E,
    LONGBENCH_V2,
    INFINITEBENCH,
    LOOGLE,
    AIME25,
    MATH500,
)
OFFICIAL: dict[str, str] = {
    name: metric for task in TASKS for name, metric in task.official.items()
}
"""The official metric of a task, by the task's name."""
TRUNCATION: dict[str, str] = {name: task.truncation for task in TASKS for name in task.official}
"""Where the benchmark of a task cuts its contexts."""
WHOLE = {"aime25": "aime25", "aime2025": "aime25", "math500": "math500"}
"""Benchmarks whose rows name no task, by a file's or folder's name without marks."""
LAYOUT_COLUMNS = (
    *("dataset", "difficulty", "choice_A", "subject", "unique_id", "id"),
    SEPARATOR,
)
"""Columns that tell more of a row than those of every data set."""
FOLDERS = 5
"""How far up folders are asked which benchmark a file is of."""
SPLIT = re.compile("(test|train|validation|data)?[-_]?([0-9]+(-of-[0-9]+)?)?")
"""Names of files as the hub has them, which do not say what is in them."""
OPTIONS = ("longbook_choice_eng", "code_debug")
"""Tasks whose converted rows name the right option by its letter alone."""
Row = dict[str, object]


def as_official(rows: Sequence[Row], path: Path) -> list[Row]:
    """Give rows the task, metric and answers that the benchmark itself gives them.

    Args:
        rows: rows with every column of a data set, "answer" and "choices" as lists of texts, and
            those of ``LAYOUT_COLUMNS`` that there are. "task" and "metric" are None where
            nothing is said.
        path: where they come from.
    """
    if _is_zero_scrolls(rows):
        return _zero_scrolls(rows)
    default = path.stem if all(row["task"] for row in rows) else _benchmark(rows, path)
    places = (path.stem, path.parent.name)
    by_length = {task for task in PROMPTS if any(_is_e(place, task) for place in places)}
    if any(_plain(place) == _plain(LONGBENCH_E.name) for place in places):
        by_length = set(PROMPTS)
    found = [_official(row, default, by_length) for row in rows]
    brought: dict[object, set[str]] = {}
    for old, new in zip(rows, found, strict=True):
        if old["metric"] is None and new["metric"] is not None:
            brought.setdefault(new["metric"], set()).add(str(new["task"]))
    for metric, tasks in brought.items():
        names = ", ".join(sorted(tasks))
        logger.info("%s: the official metric of %s is %s", path, names, metric)
    return found


def _official(row: Row, default: str, by_length: set[str]) -> Row:
    choices = row["choices"]
    if row["task"] is None and row.keys() >= {"choice_A", "difficulty"}:
        task, key = f"{row['difficulty']}-{row['length']}", "longbench-v2"
        choices = choices or list(LETTERS)
    elif row["task"] is None and default == "math500" and row.get("subject"):
        task, key = str(row["subject"]), default
    else:
        task = str(row["task"] or default)
        key = WHOLE.get(_plain(task), task)
    name, _, told = str(task).partition(" ")
    base = re.sub("[_-]e$", "", name)
    if f"{base}{SUFFIX_E}" in TASKS_E:
        key, words = base, row["length"]
        of_e = base != name or base in by_length or _is_e(str(row.get("dataset")), base)
        if of_e and not told and isinstance(words, int):
            task = f"{base}{SUFFIX_E} {bucket(words)}"
    answer = row["answer"]
    if key in OPTIONS and isinstance(answer, list):
        answer = _with_option(answer, str(row["question"]))
    metric = row["metric"] or OFFICIAL.get(str(key))
    truncation = row["truncation"] or TRUNCATION.get(str(key))
    new = {"task": task, "metric": metric, "answer": answer, "choices": choices}
    return row | new | {"truncation": truncation}


def _is_e(name: str, task: str) -> bool:
    """Tell whether a name is that of a LongBench-E task."""
    return name in (f"{task}_e", f"{task}-e")


def _benchmark(rows: Sequence[Mapping[str, object]], path: Path) -> str:
    """Guess the benchmark of a file from its name, folders and columns; else return its name."""
    folders = list(path.parents)[:FOLDERS] if SPLIT.fullmatch(path.stem) else []
    for part in (path.stem, *(folder.name for folder in folders)):
        if (plain := _plain(part.rpartition("--")[2])) in WHOLE:
            return WHOLE[plain]
    if all(row.keys() >= {"subject", "unique_id"} for row in rows):
        return "math500"
    return path.stem


def _plain(name: str) -> str:
    """Remove from a name what its spellings differ in."""
    return re.sub("[^a-z0-9]", "", name.lower())


def _with_option(answers: list[str], question: str) -> list[str]:
    """Return the text and letter of the right option, if the question lists the options."""
    if len(answers) != 1 or not re.fullmatch("[A-D]", answers[0]):
        return answers
    options = re.findall(rf"^{answers[0]}\. (.*?)$", question, re.MULTILINE)
    return [options[-1].strip(), answers[0]] if options else answers


def _is_zero_scrolls(rows: Sequence[Mapping[str, object]]) -> bool:
    """Tell whether all rows are of tasks of ZeroSCROLLS, and have no answers."""
    return all(
        row["task"] in ZERO_SCROLLS_TASKS and row["metric"] is None and not row["answer"]
        for row in rows
    )


def _zero_scrolls(rows: Sequence[Row]) -> list[Row]:
    """Merge rows to one for each sample; the file has one for each reference."""
    found: dict[object, Row] = {}
    for number, row in enumerate(rows):
        name = row.get("id")
        answer = [name] if isinstance(name, str) and name else []
        key = (row["task"], name) if answer else number
        found.setdefault(key, row | {"answer": answer, "metric": UNSCORED, **_cut(row)})
    return list(found.values())


def _cut(row: Row) -> dict[str, object]:
    """Return where and how a sample of ZeroSCROLLS is cut, unless the row says it."""
    asked = str(row["question"])
    gap = asked[: len(asked) - len(asked.lstrip())]
    separator = str(row.get(SEPARATOR) or "").removesuffix(gap)
    return {
        "truncation": row["truncation"] or ZERO_SCROLLS.truncation,
        "separator": row["separator"] or separator,
    }
