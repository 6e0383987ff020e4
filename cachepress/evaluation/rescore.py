"""Scores of old answers, without the model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.cell import METRICS, PREDICTIONS, as_json, holding
from cachepress.evaluation.records import write_atomically
from cachepress.evaluation.registry import METRIC_REGISTRY
from cachepress.evaluation.tasks.base import PERPLEXITY, UNSCORED
from cachepress.evaluation.views import score, scores_of

LISTS = ("answer", "choices")


def score_again(folder: Path, metric: str | None = None) -> list[tuple[Path, dict]]:
    """Score the answers of every run below a folder again, and write them back.

    Args:
        folder: results of one run, or a folder of such.
        metric: a metric for all samples; None for each sample's own.

    Returns:
        The folder and the metrics of each run.

    Raises:
        CachepressError: if there is no run, the metric is unknown, or a file is damaged.
    """
    if metric is not None and metric not in METRIC_REGISTRY:
        raise CachepressError(
            f"unknown metric {metric!r}: wanted one of {', '.join(sorted(METRIC_REGISTRY))}"
        )
    found = list(_runs(folder))
    if not found:
        raise CachepressError(f"{folder} has no results: wanted a folder that evaluate wrote")
    return [(run, _held(run, metric)) for run in found]


def _held(run: Path, metric: str | None) -> dict:
    with holding(run):
        return _scored(run, metric)


def _runs(folder: Path) -> Iterator[Path]:
    for place in [folder, *sorted(folder.glob("*"))]:
        if (place / PREDICTIONS).is_file() and (place / METRICS).is_file():
            yield place


def _scored(run: Path, metric: str | None) -> dict:
    rows, metrics = _read(run)
    if metric is not None:
        judged = ~rows["metric"].isin([UNSCORED, PERPLEXITY])
        rows.loc[judged, "metric"] = metric
    columns = zip(rows["predicted_answer"], *(rows[n] for n in (*LISTS, "metric")), strict=True)
    try:
        rows["score"] = [score(*row) for row in columns]
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise CachepressError(f"{run}: {metric} does not fit these answers: {error}") from error
    metrics |= scores_of(rows)
    texts = rows.assign(**{name: rows[name].map(as_json) for name in LISTS})
    write_atomically(run / PREDICTIONS, texts.to_csv(index=False, lineterminator="\n"))
    write_atomically(run / METRICS, json.dumps(metrics, indent=2) + "\n")
    return metrics


def _read(run: Path) -> tuple[pd.DataFrame, dict]:
    path = run / PREDICTIONS
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        for name in LISTS:
            rows[name] = [json.loads(text) for text in rows[name]]
        rows["context_id"] = rows["context_id"].astype(int)
        path = run / METRICS
        return rows, json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CachepressError(f"{path} is damaged: {reason}; run evaluate again") from error
