"""Reads and checks folders of results for a report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import CONFIG
from cachepress.evaluation.predictions import PREDICTIONS, read_predictions
from cachepress.evaluation.results import METRICS, Metrics
from cachepress.evaluation.typed import read_fields
from cachepress.limits import said
from cachepress.structured import parse_json, read_mapping

COLUMNS = ("sample_id", "question", "answer", "context_id", "predicted_answer")
TEXTS = ("question", "answer_prefix", "task", "metric", "context_id", "predicted_answer")
LISTS = ("answer", "choices")
NUMBERS = ("score", "kl", "length", "depth")
_SHOWN = 160
"""Characters of what is wrong in an error."""


@dataclass(frozen=True, eq=False)
class SavedRun:
    """Finished run, read from its folder: a press at a ratio, on a data set, with a model.

    Attributes:
        folder: name of its folder.
        config: every setting and version.
        press: short name of the press.
        spelling: full spelling of the press.
        ratio: nominal ratio.
        metrics: quality, bytes and seconds.
        predictions: an answer to each sample, by sample id.
    """

    folder: str
    config: Mapping[str, object]
    press: str
    spelling: str
    ratio: float
    metrics: Metrics
    predictions: pd.DataFrame


@dataclass(frozen=True)
class _Pressed:
    """Saved options of a run that name its press."""

    press: str
    compression_ratio: float
    press_name: str | None = None


def read_runs(folder: Path) -> tuple[list[SavedRun], list[str]]:
    """Read every finished run of a folder of results, and list the unfinished ones.

    Raises:
        CachepressError: if the folder or one of the files is damaged or foreign, or if no run is
            finished.
    """
    if not folder.is_dir():
        raise CachepressError(f"{folder} is not a folder: wanted one with result folders in it")
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    runs = [read_run(path) for path in found if (path / METRICS).exists()]
    unfinished = [path.name for path in found if not (path / METRICS).exists()]
    if not runs:
        raise CachepressError(
            f"{folder} has no finished results: run cachepress evaluate --output-dir {folder} first"
        )
    return runs, unfinished


def read_run(folder: Path) -> SavedRun:
    """Read one finished run.

    Raises:
        CachepressError: if one of its files is damaged or foreign.
    """
    metrics, config = Metrics.read(folder), read_mapping(folder / CONFIG)
    pressed = read_fields(_Pressed, folder / CONFIG, config)
    return SavedRun(
        folder=folder.name,
        config=config,
        press=pressed.press_name or pressed.press,
        spelling=pressed.press,
        ratio=pressed.compression_ratio,
        metrics=metrics,
        predictions=_predictions(folder / PREDICTIONS),
    )


def _predictions(path: Path) -> pd.DataFrame:
    """Read and check predictions.csv: texts, lists, and numbers with NaN where there is none."""
    try:
        table = read_predictions(path)
    except OSError as error:
        raise CachepressError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CachepressError(f"{path} is damaged: {said(error, _SHOWN)}") from error
    for name in COLUMNS:
        if name not in table:
            raise CachepressError(f"{path} is no file of ours: it has no column {name!r}")
    if table["sample_id"].duplicated().any():
        raise CachepressError(f"{path} is damaged: two rows have the same sample_id")
    try:
        columns = {name: _column(table, name) for name in (*TEXTS, *LISTS, *NUMBERS)}
    except ValueError as error:
        raise CachepressError(f"{path} is damaged: {said(error, _SHOWN)}") from error
    return pd.DataFrame(columns).set_index(pd.Index(table["sample_id"], name="sample_id"))


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    cells = list(table[name]) if name in table else [""] * len(table)
    if name in NUMBERS:
        return pd.Series([float(cell) if cell else math.nan for cell in cells], dtype=float)
    # A column of texts of its own kind would not take half of a surrogate pair.
    return pd.Series([_texts(cell) for cell in cells] if name in LISTS else cells, dtype=object)


def _texts(cell: str) -> list[str]:
    """Parse a JSON list, or one text."""
    value = parse_json(cell) if cell else []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
