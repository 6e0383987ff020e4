"""A local table as a data set."""

import json
from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
REQUIRED = ("context", "question", "answer")
OPTIONAL = {"answer_prefix": "", "max_new_tokens": 50, "task": None, "length": None, "depth": None}
COLUMNS = (*REQUIRED, *OPTIONAL)


def load_file(path: Path) -> pd.DataFrame:
    """Read a .csv, .jsonl or .parquet file with the columns of a data set.

    Needed are context, question and answer; answer_prefix, max_new_tokens, task, length and depth
    have defaults. An answer is a text, or a list of texts (in CSV written as JSON).

    Raises:
        CachepressError: if the file is missing, empty or unreadable, or lacks a column.
    """
    if not path.is_file():
        raise CachepressError(f"data file {path} does not exist")
    try:
        table = _read(path)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CachepressError(f"data file {path} cannot be read: {reason}") from error
    missing = [name for name in REQUIRED if name not in table.columns]
    if missing:
        raise CachepressError(
            f"data file {path} has no column {missing[0]!r}: it has "
            f"{', '.join(map(str, table.columns)) or 'none'}, wanted {', '.join(REQUIRED)}"
        )
    if table.empty:
        raise CachepressError(f"data file {path} has no rows")
    return normalise(table, task=path.stem, origin=f"data file {path}")


def normalise(table: pd.DataFrame, task: str, origin: str) -> pd.DataFrame:
    """The table with exactly the columns of a data set, answers as lists of texts."""
    table = table.reset_index(drop=True).copy()
    for name, default in OPTIONAL.items():
        if name not in table.columns:
            table[name] = default
    table["question"] = table["question"].fillna("").astype(str)
    table["answer_prefix"] = table["answer_prefix"].fillna("").astype(str)
    table["task"] = table["task"].fillna(task)
    for number, context in enumerate(table["context"]):
        if not isinstance(context, str) or not context.strip():
            raise CachepressError(f"{origin}, row {number}: the context is empty")
    answers = [_answers(value) for value in table["answer"]]
    for number, (answer, limit) in enumerate(zip(answers, table["max_new_tokens"], strict=True)):
        if not answer:
            raise CachepressError(f"{origin}, row {number}: the answer is empty")
        if not str(limit).isdigit() or int(limit) < 1:
            raise CachepressError(f"{origin}, row {number}: max_new_tokens is {limit!r}")
    table["answer"] = pd.Series(answers, dtype=object)
    table["max_new_tokens"] = table["max_new_tokens"].astype(int)
    return table[list(COLUMNS)]


def _read(path: Path) -> pd.DataFrame:
    if path.suffix == ".csv":
        return pd.read_csv(path, keep_default_na=False)
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    return pd.read_json(path, lines=path.suffix == ".jsonl", dtype=False)


def _answers(value: object) -> list[str]:
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [str(value)]
    if isinstance(value, str | int | float):
        return [str(value)] if str(value) else []
    return [str(item) for item in value] if value is not None else []
