"""Tables and numbers as views of records."""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.registry import METRIC_REGISTRY, REPORTS
from cachepress.evaluation.samples import PROMPTING
from cachepress.evaluation.statistics import Estimate, estimate, interval, positive_interval
from cachepress.evaluation.tasks.base import PERPLEXITY, UNSCORED, Report

logger = logging.getLogger(__name__)
_NUMBERS = (
    *("context_tokens", "prefill_seconds", "press_seconds", "step_seconds", "bytes_before"),
    *("step_seconds_low", "step_seconds_high"),
    *("bytes_after", "rows_seen", "rows_held", "peak_memory_bytes", "cut_tokens"),
)
"""Costs of a context; where each question has a reading of its own, of one reading."""
RECORDED_LATER = ("cut_tokens", "prompts", "step_seconds_low", "step_seconds_high")
"""Fields that the oldest records do not have."""


def predictions_of(
    table: pd.DataFrame, records: Mapping[int, Mapping[str, object]], ratio: float
) -> pd.DataFrame:
    """The table without its contexts, with what was recorded of each sample, and its score.

    Args:
        table: the data set, by sample id.
        records: a record for each sample id.
        ratio: the nominal ratio.
    """
    # A column of texts of its own kind would not take half of a surrogate pair.
    recorded = pd.DataFrame.from_dict(dict(records), orient="index", dtype=object)
    for name in RECORDED_LATER:
        if name not in recorded:
            recorded[name] = None
    names = [name for name in recorded if name not in ("sample_id", "context_id")]
    about = table.drop(columns=["context", *PROMPTING], errors="ignore")
    joined = about.join(recorded[names])
    columns = zip(
        joined["predicted_answer"],
        joined["answer"],
        joined["choices"],
        joined["metric"],
        strict=True,
    )
    scores = [score(*row) for row in columns]
    return joined.assign(
        score=pd.Series(scores, index=joined.index, dtype=float), compression_ratio=ratio
    )


def score(prediction: str, answer: Sequence[str], choices: Sequence[str], metric: str) -> float:
    """Score of an answer; NaN where nothing judges it."""
    if metric in (UNSCORED, PERPLEXITY):
        return math.nan
    return METRIC_REGISTRY[metric](prediction, answer, choices)


def metrics_of(predictions: pd.DataFrame, query_aware: bool) -> dict[str, object]:
    """Quality with intervals, bytes and seconds of a run.

    Args:
        predictions: what ``predictions_of`` gave.
        query_aware: whether the press saw the question.
    """
    return {
        **scores_of(predictions),
        "query_aware": query_aware,
        "kl": _positive(predictions, "kl"),
        "perplexity": _perplexity(predictions),
        **_costs(predictions),
    }


def scores_of(predictions: pd.DataFrame) -> dict[str, object]:
    """What judged, and mean scores with intervals: of everything, and of each task."""
    by_task = predictions.groupby("task", sort=False)
    tasks = {str(task): _estimated(rows, "score") for task, rows in by_task}
    reported = {str(task): found for task, rows in by_task if (found := _reported(rows))}
    return {
        "metrics": sorted(set(predictions["metric"])),
        "score": _estimated(predictions, "score"),
        "tasks": {task: found for task, found in tasks.items() if found is not None},
        "reported": reported,
    }


def _reported(rows: pd.DataFrame) -> dict[str, dict]:
    """What the benchmark reports of the answers to a task beside their score."""
    metrics = set(rows["metric"])
    reports = REPORTS.get(metrics.pop(), {}) if len(metrics) == 1 else {}
    found = {}
    for name, report in reports.items():
        try:
            found[name] = _finite(_weighted(rows, report))
        except CachepressError as error:
            logger.info("%s is not reported: %s", name, error)
    return found


def _weighted(rows: pd.DataFrame, report: Report) -> Estimate:
    """The weighted mean of a report with the interval of such a ratio, to first order."""
    columns = zip(rows["predicted_answer"], rows["answer"], rows["choices"], strict=True)
    scores = [report.metric(*row) for row in columns]
    weights = [report.weight(answer) if report.weight else 1 for answer in rows["answer"]]
    mean = statistics.fmean(scores, weights)
    # The mean of these is that mean, and their variance that of the ratio of two sums.
    share = [weight * len(weights) / sum(weights) for weight in weights]
    linear = [mean + w * (score - mean) for w, score in zip(share, scores, strict=True)]
    return replace(estimate(linear, list(rows["context_id"])), mean=mean)


def _estimated(rows: pd.DataFrame, column: str) -> dict | None:
    rows = rows[rows[column].notna()]
    return asdict(estimate(list(rows[column]), list(rows["context_id"]))) if len(rows) else None


def _positive(rows: pd.DataFrame, column: str) -> dict | None:
    rows = rows[rows[column].notna()]
    if not len(rows):
        return None
    return _finite(positive_interval(list(rows[column]), list(rows["context_id"])))


def _perplexity(rows: pd.DataFrame) -> dict | None:
    rows = rows[rows["nll"].notna()]
    if not len(rows):
        return None
    nll = interval(list(rows["nll"]), list(rows["context_id"]))
    low, high = (math.inf if x == math.inf else math.exp(x) for x in (nll.low, nll.high))
    return _finite(replace(nll, mean=math.exp(nll.mean), low=low, high=high))


def _finite(found: Estimate) -> dict:
    """The estimate for JSON, which knows no infinity."""
    return {k: None if v in (math.inf, -math.inf) else v for k, v in asdict(found).items()}


def _cuts(tokens: pd.Series) -> dict[str, int | None]:
    """How many contexts were cut, and by how many tokens in all; None where it is not recorded."""
    if tokens.isna().any():
        return {"cut_contexts": None, "cut_tokens": None}
    return {"cut_contexts": int((tokens > 0).sum()), "cut_tokens": round(tokens.sum())}


def _costs(predictions: pd.DataFrame) -> dict[str, object]:
    """Measured bytes and seconds of all contexts; medians, since a machine is never quiet."""
    numbers = predictions[list(_NUMBERS)].astype(float)
    contexts = numbers.groupby(predictions["context_id"]).mean()

    def median(column: str) -> float | None:
        numbers = contexts[column].dropna()
        return statistics.median(numbers) if len(numbers) else None

    def speed(column: str) -> float | None:
        step = median(column)
        return 1 / step if step else None

    peak = contexts["peak_memory_bytes"]
    return {
        "compression_ratio": 1 - float(contexts["rows_held"].sum() / contexts["rows_seen"].sum()),
        "cache_bytes_before": float(contexts["bytes_before"].mean()),
        "cache_bytes_after": float(contexts["bytes_after"].mean()),
        "context_tokens": float(contexts["context_tokens"].mean()),
        **_cuts(contexts["cut_tokens"]),
        "prefill_seconds": median("prefill_seconds"),
        "press_seconds": median("press_seconds"),
        "decode_tokens_per_second": speed("step_seconds"),
        "decode_tokens_per_second_low": speed("step_seconds_high"),
        "decode_tokens_per_second_high": speed("step_seconds_low"),
        "peak_memory_bytes": None if peak.isna().all() else int(peak.max()),
        "machine": ", ".join(sorted(set(predictions["machine"]))),
    }
