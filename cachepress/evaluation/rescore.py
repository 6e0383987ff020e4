"""Scores saved answers again, without the model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.predictions import PREDICTIONS, read_predictions, write_predictions
from cachepress.evaluation.registry import UNJUDGED, find_metric
from cachepress.evaluation.results import METRICS, Metrics, scores_in, scores_of
from cachepress.evaluation.run import as_json, lock_folder
from cachepress.evaluation.samples import check_metrics, judged_by
from cachepress.evaluation.tasks.base import DIGITS
from cachepress.limits import said, shown
from cachepress.structured import parse_json

LISTS = ("answer", "choices")
COLUMNS = (*LISTS, "context_id", "task", "metric", "predicted_answer")
"""What a score is made of."""


def score_again(folder: Path, metric: str | None = None) -> list[tuple[Path, Metrics]]:
    """Score the answers of every run below a folder again, and write them back.

    Whatever metric a run was scored by, each of its samples keeps its own.

    Args:
        folder: results of one run, or a folder of such.
        metric: a metric for all samples; None for each sample's own.

    Returns:
        The folder and the metrics of each run.

    Raises:
        CachepressError: if there is no run, the metric is unknown or does not fit, or a file is
            damaged.
    """
    if metric is not None:
        find_metric(metric)
    found = list(_runs(folder))
    if not found:
        raise CachepressError(f"{folder} has no results: wanted a folder that evaluate wrote")
    for run in found:
        _judged(run, metric)
    return [(run, _scored(run, metric)) for run in found]


def _runs(folder: Path) -> Iterator[Path]:
    for place in [folder, *sorted(folder.glob("*"))]:
        if (place / PREDICTIONS).is_file() and (place / METRICS).is_file():
            yield place


def _scored(run: Path, metric: str | None) -> Metrics:
    with lock_folder(run):
        rows, metrics = _judged(run, metric)
        rows["score"] = scores_in(rows)
        metrics = replace(metrics, **vars(scores_of(rows)))
        texts = rows.assign(**{name: rows[name].map(as_json) for name in LISTS})
        write_predictions(run / PREDICTIONS, texts)
        metrics.write(run)
        return metrics


def _judged(run: Path, metric: str | None) -> tuple[pd.DataFrame, Metrics]:
    """Read a run's predictions, with a checked metric for each row, and its metrics so far."""
    rows, metrics = _read(run)
    _check_number(run, rows, metrics)
    rows = judged_by(rows, metric)
    check_metrics(rows, str(run))
    return rows, metrics


def _check_number(run: Path, rows: pd.DataFrame, metrics: Metrics) -> None:
    """Raise CachepressError if predictions.csv lacks rows that metrics.json counts."""
    judged = sum(name not in UNJUDGED for name in rows["metric"])
    if metrics.score is not None and metrics.score.samples != judged:
        raise CachepressError(
            f"{run / PREDICTIONS} is damaged: got {judged} samples with a score, wanted "
            f"{metrics.score.samples} as {METRICS} says; run evaluate again"
        )


def _read(run: Path) -> tuple[pd.DataFrame, Metrics]:
    path = run / PREDICTIONS
    try:
        rows = read_predictions(path)
        for name in COLUMNS:
            if name not in rows:
                raise ValueError(f"no column {name!r}")
        for name in LISTS:
            rows[name] = [_texts(cell) for cell in rows[name]]
        rows["context_id"] = [_number(cell) for cell in rows["context_id"]]
        if not len(rows):
            raise ValueError("it has no rows")
    except (ValueError, RecursionError) as error:
        raise CachepressError(f"{path} is damaged: {said(error)}; run evaluate again") from error
    return rows, Metrics.read(run)


def _number(cell: str) -> int:
    if not (cell.isascii() and cell.isdecimal() and len(cell) <= DIGITS):
        raise ValueError(f"the context_id is {shown(cell)}, wanted a whole number")
    return int(cell)


def _texts(cell: str) -> list[str]:
    texts = parse_json(cell)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{cell[:40]!r} is no list of texts")
    return texts
