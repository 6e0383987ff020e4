"""A local table as a data set."""

from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.tasks.base import REQUIRED, normalise

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")


def load_file(path: Path) -> pd.DataFrame:
    """Read a .csv, .jsonl or .parquet file with the columns of a data set.

    Needed are context, question and answer; the other columns have defaults. An answer is a text,
    or a list of texts (in CSV written as JSON).

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


def _read(path: Path) -> pd.DataFrame:
    if path.suffix == ".csv":
        return pd.read_csv(path, keep_default_na=False)
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    return pd.read_json(path, lines=path.suffix == ".jsonl", dtype=False)
