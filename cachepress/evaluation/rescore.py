"""Scores of old answers, without the model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.predictions import read_predictions, write_predictions
from cachepress.evaluation.records import write_atomically
from cachepress.evaluation.registry import UNJUDGED, find_metric
from cachepress.evaluation.results import score, scores_of
from cachepress.evaluation.run import METRICS, PREDICTIONS, as_json, holding
from cachepress.evaluation.samples import check_metrics, judged_by
from cachepress.evaluation.tasks.base import DIGITS
from cachepress.limits import said, shown
from cachepress.structured import parse_json, read_mapping

LISTS = ("answer", "choices")
COLUMNS = (*LISTS, "context_id", "task", "metric", "predicted_answer")
"""What a score is made of."""
SPEED = "decode_tokens_per_second"
COSTS = (
    *("compression_ratio", "cache_bytes_before", "cache_bytes_after", "prefill_seconds"),
    SPEED,
)


def score_again(folder: Path, metric: str | None = None) -> list[tuple[Path, dict]]:
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
    return [(run, _held(run, metric)) for run in found]


def _held(run: Path, metric: str | None) -> dict:
    with holding(run):
        return _scored(run, metric)


def _runs(folder: Path) -> Iterator[Path]:
    for place in [folder, *sorted(folder.glob("*"))]:
        if (place / PREDICTIONS).is_file() and (place / METRICS).is_file():
            yield place


def _scored(run: Path, metric: str | None) -> dict:
    rows, metrics = _judged(run, metric)
    columns = zip(rows["predicted_answer"], *(rows[n] for n in (*LISTS, "metric")), strict=True)
    rows["score"] = [score(*row) for row in columns]
    metrics |= scores_of(rows)
    texts = rows.assign(**{name: rows[name].map(as_json) for name in LISTS})
    write_predictions(run / PREDICTIONS, texts)
    write_atomically(run / METRICS, json.dumps(metrics, indent=2) + "\n")
    return metrics


def _judged(run: Path, metric: str | None) -> tuple[pd.DataFrame, dict]:
    """The rows of a run with what is to judge them, which fits, and its metrics so far."""
    rows, metrics = _read(run)
    _check_number(run, rows, metrics)
    rows = judged_by(rows, metric)
    check_metrics(rows, str(run))
    return rows, metrics


def _check_number(run: Path, rows: pd.DataFrame, metrics: dict) -> None:
    """Refuse a table that has lost rows, whose mean would be another one."""
    before = metrics.get("score")
    wanted = before.get("samples") if isinstance(before, dict) else None
    judged = sum(name not in UNJUDGED for name in rows["metric"])
    if isinstance(wanted, int) and wanted != judged:
        raise CachepressError(
            f"{run / PREDICTIONS} is damaged: got {judged} samples with a score, wanted {wanted} "
            f"as {METRICS} says; run evaluate again"
        )


def _read(run: Path) -> tuple[pd.DataFrame, dict]:
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
    return rows, _metrics(run / METRICS)


def _metrics(path: Path) -> dict:
    """The metrics of a run, which have what a table shows of costs."""
    metrics = read_mapping(path)
    for name in COSTS:
        value = metrics.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number and (value is not None or name != SPEED):
            raise CachepressError(
                f"{path} is damaged: {name} is {shown(value)}, wanted a number; run evaluate again"
            )
    perplexity = metrics.get("perplexity")
    if perplexity is not None and not _is_estimate(perplexity):
        raise CachepressError(
            f"{path} is damaged: perplexity is {shown(perplexity)}; run evaluate again"
        )
    return {"perplexity": None, **metrics}


def _is_estimate(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("mean"), int | float)
        and all(isinstance(value.get(end), int | float | None) for end in ("low", "high"))
    )


def _number(cell: str) -> int:
    if not (cell.isascii() and cell.isdecimal() and len(cell) <= DIGITS):
        raise ValueError(f"the context_id is {shown(cell)}, wanted a whole number")
    return int(cell)


def _texts(cell: str) -> list[str]:
    texts = parse_json(cell)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{cell[:40]!r} is no list of texts")
    return texts
