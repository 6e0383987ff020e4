"""ZeroSCROLLS, ten tasks on long documents (Shaham et al., arXiv:2305.14196).

The benchmark judges answers itself, so rows are not scored here: their answer is the sample's id,
by which ``write_submission`` names the predictions.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.records import write_atomically
from cachepress.evaluation.tasks.base import UNSCORED, Task, normalise
from cachepress.evaluation.tasks.sources import Hub, in_format, read_rows
from cachepress.hf.types import PreTrainedTokenizerBase

REPOSITORY = "tau/zero_scrolls"
SEPARATOR = "truncation_seperator"
"""The column, as the benchmark spells it, with what stands where a document was cut."""
MAX_NEW_TOKENS = {
    "gov_report": 1024,
    "summ_screen_fd": 512,
    "qmsum": 512,
    "squality": 512,
    "qasper": 128,
    "narrative_qa": 64,
    "quality": 10,
    "musique": 32,
    "space_digest": 36,
    "book_sum_sort": 256,
}


def load_zero_scrolls(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Load the samples of one task, one row an id, from the benchmark's own files.

    Their texts are the benchmark's own prompts: an instruction and the document, which become
    the context, then the question and the beginning of the answer.

    Raises:
        CachepressError: if its file is not to be had, or is in another format.
    """
    task = str(config.data_dir)
    name = f"{task}/test.jsonl"
    rows = read_rows(config.data_path, [name], Hub(REPOSITORY, f"{task}.zip", name))
    samples: dict[str, tuple[str, str, str, str]] = {}
    with in_format(name, "ZeroSCROLLS'"):
        for row in rows:
            # A sample with several references stands there once for each.
            samples.setdefault(row["id"], _parts(row))
    table = pd.DataFrame(
        [(*parts, [key]) for key, parts in samples.items()],
        columns=["context", "question", "answer_prefix", "separator", "answer"],
    )
    table = table.assign(max_new_tokens=MAX_NEW_TOKENS[task], metric=UNSCORED)
    return normalise(table, task=task, origin=name)


def _parts(row: Mapping) -> tuple[str, str, str, str]:
    """Split a row: context, question, answer's beginning, and the mark of a cut context."""
    text, document, query = row["input"], row["document_end_index"], row["query_end_index"]
    if not 0 < document <= len(text):
        raise ValueError(f"the document ends at {document}")
    begin = max(query, document)
    begin += len(text[begin:]) - len(text[begin:].lstrip())
    gap = text[document : row.get("query_start_index", document)]
    separator = row.get(SEPARATOR, "").removesuffix(gap)
    return text[:document], text[document:begin], text[begin:].rstrip(), separator


def write_submission(predictions: pd.DataFrame, folder: Path) -> list[Path]:
    """Write ``<task>.json`` for each task, from the id of a sample to its prediction.

    These are the files that the benchmark's own script makes its submission of. It accepts one
    only if it has every sample of the task.

    Args:
        predictions: of one or more runs, with the columns "task", "answer", which is the id as
            ``load_zero_scrolls`` sets it, and "predicted_answer"; as a run gives it or as its
            predictions.csv has it.
        folder: where the files go.

    Returns:
        The files, in the order of the tasks in the table.

    Raises:
        CachepressError: if a row is of another benchmark, a sample has two predictions, or a
            prediction is not a text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _write_task(str(task), rows, folder)
        for task, rows in predictions.groupby("task", sort=False)
    ]


def submit_if_ours(predictions: pd.DataFrame, folder: Path) -> None:
    """Write the submission for a table of ZeroSCROLLS, if it has the ids; do nothing for others."""
    tasks, metrics = set(predictions["task"]), set(predictions["metric"])
    if (
        metrics == {UNSCORED}
        and tasks <= MAX_NEW_TOKENS.keys()
        and all(list(predictions["answer"]))
    ):
        write_submission(predictions, folder)


def _write_task(task: str, rows: pd.DataFrame, folder: Path) -> Path:
    if task not in MAX_NEW_TOKENS:
        raise CachepressError(f"ZeroSCROLLS has no task {task!r}")
    named: dict[str, str] = {}
    for answer, prediction in zip(rows["answer"], rows["predicted_answer"], strict=True):
        key = _id(task, answer)
        if key in named:
            raise CachepressError(f"{task}: two predictions are of sample {key}")
        if not isinstance(prediction, str):
            raise CachepressError(
                f"{task}: the prediction of sample {key} is {prediction!r}: read the table with "
                "dtype=str and keep_default_na=False"
            )
        named[key] = prediction
    path = folder / f"{task}.json"
    write_atomically(path, json.dumps(named, indent=2, ensure_ascii=False) + "\n")
    return path


def _id(task: str, answer: object) -> str:
    """Return the sample's id from its answer, a list or JSON."""
    try:
        texts = json.loads(answer) if isinstance(answer, str) else answer
        (key,) = list(texts) if isinstance(texts, Iterable) else []
    except ValueError as error:
        raise CachepressError(f"{task}: the answer {answer!r} is not the id of a sample") from error
    return str(key)


ZERO_SCROLLS = Task(
    name="zero_scrolls",
    about="summaries, questions and sorting, judged by the benchmark (arXiv:2305.14196)",
    load=load_zero_scrolls,
    parts=tuple(MAX_NEW_TOKENS),
    submit=write_submission,
)
