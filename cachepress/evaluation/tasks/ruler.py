"""RULER, synthetic tasks of any length (Hsieh et al., arXiv:2404.06654).

The benchmark's scripts write context, question and the beginning of the answer as one text. Its
wording tells them apart; a text of other wording is refused rather than read as one long context.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.metrics import string_match
from cachepress.evaluation.tasks.base import Task, normalise
from cachepress.evaluation.tasks.sources import Hub, read_rows
from cachepress.hf.types import PreTrainedTokenizerBase

REPOSITORY = "simonjegou/ruler"
HUB_FILE = "{length}/test-00000-of-00001.parquet"
HUB_COLUMNS = ("context", "question", "answer_prefix", "answer", "max_new_tokens", "task")
LOCAL_FILES = ("{task}/validation.jsonl", "data/{task}/validation.jsonl", "{task}.jsonl")
_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Kind:
    """Wording and metric of some of the tasks.

    Attributes:
        opening: pattern of the beginning of the text.
        question: pattern of the beginning of the question; an example may ask the same before.
        prefix: pattern of the beginning of the answer.
        max_new_tokens: most tokens of an answer.
        metric: name of the metric.
    """

    opening: str
    question: str
    prefix: str
    max_new_tokens: int
    metric: str = "ruler_all"


_NIAH = Kind(
    opening="(A|Some) special magic ",
    question="What (is|are all) the special magic ",
    prefix="The special magic ",
    max_new_tokens=128,
)
_QA = Kind(
    opening="Answer the question based on the given documents",
    question="Answer the question based on the given documents",
    prefix="Answer:$",
    max_new_tokens=32,
    metric="ruler_part",
)
KINDS: dict[str, Kind] = {
    "niah_single_1": _NIAH,
    "niah_single_2": _NIAH,
    "niah_single_3": _NIAH,
    "niah_multikey_1": _NIAH,
    "niah_multikey_2": _NIAH,
    "niah_multikey_3": _NIAH,
    "niah_multivalue": _NIAH,
    "niah_multiquery": _NIAH,
    "vt": Kind(
        opening="Memorize and track the chain",
        question="Question: Find all variables ",
        prefix="Answer: According to ",
        max_new_tokens=30,
    ),
    "cwe": Kind(
        opening="Below is a numbered list of words",
        question="Question: What are the ",
        prefix="Answer: The top ",
        max_new_tokens=120,
    ),
    "fwe": Kind(
        opening="Read the following coded text",
        question="Question: Do not provide any explanation",
        prefix="Answer: According to ",
        max_new_tokens=50,
    ),
    "qa_1": _QA,
    "qa_2": _QA,
}


def ruler_all(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score the share of answers that the prediction contains."""
    return string_match(_printable(prediction), answers)


def ruler_part(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score whether the prediction contains one of the answers."""
    return float(ruler_all(prediction, answers) > 0)


def _printable(prediction: str) -> str:
    return _CONTROL.sub("\n", prediction.strip()).strip()


def split(text: str, kind: Kind, prefix: str | None = None) -> tuple[str, str, str]:
    """Split a text into context, question and the beginning of the answer.

    Args:
        text: all three, or the first two.
        kind: how they are worded.
        prefix: the beginning of the answer, where the text does not have it.

    Raises:
        ValueError: if the text is worded differently.
    """
    text = text.lstrip()
    if not re.match(kind.opening, text):
        raise ValueError(
            f"the input starts with {text[:30]!r}, wanted RULER's own words: write it with "
            "--model_template_type base, the model's chat template is added here"
        )
    places = [match.start() for match in re.finditer(kind.question, text)]
    if not places or places[-1] == 0:
        raise ValueError("the input has no question in RULER's own words")
    context, question = text[: places[-1]], text[places[-1] :]
    if prefix is None:
        found = re.search(kind.prefix, question.rstrip())
        place = len(question) if found is None else found.start()
        question, prefix = question[:place], question[place:]
    # A space between the two stays with the question: a chat template may come between them.
    space = len(prefix) - len(prefix.lstrip())
    return context, question + prefix[:space], prefix[space:]


def load_ruler(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Load the rows of a length, of a task, or of a task at a length.

    The part is a length ("4096"), a task ("vt"), both ("4096/vt"), or nothing for all tasks. In a
    folder, a part without a length means files that lie in no folder of a length; the hub has
    lengths only.

    Raises:
        CachepressError: if there is no such part, its file is not to be had, or is in another
            format.
    """
    length, tasks = _part(config.data_dir)
    hub_file = HUB_FILE.format(length=length)
    local = config.data_path is not None and not (Path(config.data_path) / hub_file).is_file()
    if local:
        rows = [row for task in tasks for row in _own_rows(str(config.data_path), length, task)]
    elif length is None:
        raise CachepressError(
            f"ruler: got data_dir={config.data_dir!r}, wanted a length such as 4096 or 4096/vt: "
            "the hub has no other parts"
        )
    else:
        rows = _hub_rows(config.data_path, length, tasks)
    return normalise(pd.DataFrame(rows), task="ruler", origin="ruler")


def _part(data_dir: str | None) -> tuple[str | None, Sequence[str]]:
    length, _, task = (data_dir or "").rpartition("/")
    if not length and task.isdigit():
        length, task = task, ""
    if (length and not length.isdigit()) or (task and task not in KINDS):
        raise CachepressError(
            f"ruler: got data_dir={data_dir!r}, wanted a length, a task or length/task, such as "
            f"4096 or 4096/vt; tasks are {', '.join(KINDS)}"
        )
    return length or None, [task] if task else list(KINDS)


def _own_rows(folder: str, length: str | None, task: str) -> list[dict[str, object]]:
    """Convert the rows of a file that the benchmark's scripts have written."""
    base = f"{length}/" if length else ""
    names = [base + name.format(task=task) for name in LOCAL_FILES]
    rows = []
    for number, row in enumerate(read_rows(folder, names)):
        try:
            rows.append(_own_row(row, task))
        except KeyError as error:
            raise CachepressError(f"{names[0]} is not in RULER's format: no {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise CachepressError(f"{names[0]}, row {number}: {error}") from error
    return rows


def _own_row(row: Mapping, task: str) -> dict[str, object]:
    kind = KINDS[task]
    context, question, prefix = split(row["input"], kind, row.get("answer_prefix"))
    return {
        "context": context,
        "question": question,
        "answer_prefix": prefix,
        "answer": row["outputs"],
        "max_new_tokens": kind.max_new_tokens,
        "length": row["length"],
        "task": task,
        "metric": kind.metric,
    }


def _hub_rows(folder: str | None, length: str, tasks: Sequence[str]) -> list[dict[str, object]]:
    name = HUB_FILE.format(length=length)
    rows = read_rows(folder, [name], Hub(REPOSITORY, name))
    if missing := [column for column in HUB_COLUMNS if column not in rows[0]]:
        raise CachepressError(f"{name} is not in the format of {REPOSITORY}: no {missing[0]!r}")
    chosen = [row for row in rows if row["task"] in tasks]
    if not chosen:
        raise CachepressError(f"{name} has no rows of the task {', '.join(tasks)}")
    return [
        {column: row[column] for column in HUB_COLUMNS}
        | {"length": int(length), "metric": KINDS[row["task"]].metric}
        for row in chosen
    ]


RULER = Task(
    name="ruler",
    about="retrieval, tracing, counting and questions at any length (arXiv:2404.06654)",
    load=load_ruler,
    metrics={"ruler_all": ruler_all, "ruler_part": ruler_part},
    official={name: kind.metric for name, kind in KINDS.items()},
)
