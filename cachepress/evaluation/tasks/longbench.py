"""LongBench-E, the part with questions and short answers (Bai et al., arXiv:2308.14508)."""

import io
import json
import zipfile
from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.tasks.files import normalise

REPOSITORY = "THUDM/LongBench"
TASKS = ("2wikimqa_e", "hotpotqa_e", "multifieldqa_en_e", "qasper_e")
MAX_NEW_TOKENS = {"multifieldqa_en_e": 64, "qasper_e": 128}
INTRODUCTION = "Read the following text. A question about it comes after it.\n\n"
ASK = (
    "\n\nAnswer with the shortest phrase that is right, taken from the text, and add no "
    "explanation.\nQuestion: {question}"
)


def load_longbench_e(task: str | None, folder: str | None) -> pd.DataFrame:
    """The rows of one task, from the benchmark's own files.

    Args:
        task: one of ``TASKS``.
        folder: folder with ``<task>.jsonl``; None to fetch the benchmark's archive from the hub.

    Raises:
        CachepressError: if the task is unknown, or its file is not to be had.
    """
    if task not in TASKS:
        raise CachepressError(
            f"longbench-e: got data_dir={task!r}, wanted one of {', '.join(TASKS)}"
        )
    lines = _local(Path(folder), task) if folder is not None else _from_hub(task)
    try:
        rows = [json.loads(line) for line in lines.splitlines() if line.strip()]
        table = pd.DataFrame(
            {
                "context": [INTRODUCTION + row["context"] for row in rows],
                "question": [ASK.format(question=row["input"]) for row in rows],
                "answer": [row["answers"] for row in rows],
                "answer_prefix": "Answer:",
                "max_new_tokens": MAX_NEW_TOKENS.get(task, 32),
                "length": [row["length"] for row in rows],
            }
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CachepressError(f"{task}.jsonl is not in LongBench's format: {error!r}") from error
    if table.empty:
        raise CachepressError(f"{task}.jsonl has no rows")
    return normalise(table, task=task, origin=f"{task}.jsonl")


def _local(folder: Path, task: str) -> str:
    path = folder / f"{task}.jsonl"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CachepressError(f"cannot read {path}: {error.strerror or error}") from error


def _from_hub(task: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        archive = hf_hub_download(REPOSITORY, "data.zip", repo_type="dataset")
    except Exception as error:
        raise CachepressError(
            f"the hub does not give {REPOSITORY} ({type(error).__name__}): unpack its data.zip "
            "yourself and name the folder with --data-path"
        ) from error
    with zipfile.ZipFile(archive) as files, files.open(f"data/{task}.jsonl") as file:
        return io.TextIOWrapper(file, encoding="utf-8").read()
