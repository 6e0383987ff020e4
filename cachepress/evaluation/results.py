"""Computes the results of an evaluation (metrics.json): quality with intervals, bytes, seconds.

They are computed from answers, written, and read again. Tables of several results are in
``cachepress.evaluation.summary`` and ``cachepress.pages``.
"""

import json
import logging
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.records import SCHEMA, Answer, check_schema, write_atomically
from cachepress.evaluation.registry import METRIC_REGISTRY, REPORTS, UNJUDGED
from cachepress.evaluation.samples import PROMPTING
from cachepress.evaluation.statistics import Estimate, estimate, interval, positive_interval
from cachepress.evaluation.tasks.base import Report
from cachepress.evaluation.typed import plain, read_fields
from cachepress.structured import read_mapping

logger = logging.getLogger(__name__)
METRICS = "metrics.json"
_COSTS = (
    *("context_tokens", "prefill_seconds", "press_seconds", "step_seconds", "bytes_before"),
    *("step_seconds_low", "step_seconds_high"),
    *("bytes_after", "rows_seen", "rows_held", "peak_memory_bytes", "cut_tokens"),
)
"""Costs of a context; where each question has a reading of its own, of one reading."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Mean scores of an evaluation, of all samples and of each task.

    Attributes:
        metrics: names of what judged them.
        score: mean score with its interval; None where nothing was judged.
        tasks: the same for each task.
        reported: for each task, what its benchmark reports beside the score, by name.
    """

    metrics: list[str]
    score: Estimate | None
    tasks: Mapping[str, Estimate | None]
    reported: Mapping[str, Mapping[str, Estimate | None]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Metrics(Scores):
    """Metrics of an evaluation: scores, divergence, bytes and seconds.

    Attributes:
        query_aware: whether the press saw the question.
        kl: KL divergence from what the uncompressed model expects; None if it was not measured.
        perplexity: of the texts that the model was made to say; None if there are none.
        compression_ratio: fraction of key-value pairs that are gone, measured.
        cache_bytes_before: bytes of an uncompressed cache of a context, mean.
        cache_bytes_after: bytes that the compressed one has allocated, mean.
        context_tokens: tokens of a context, mean.
        cut_contexts: contexts that were cut, as they were too long; None if that is not known.
        cut_tokens: tokens of them that are gone.
        prefill_seconds: seconds of reading a context, compression included, median.
        press_seconds: the part of it that the press added; None if it was not measured.
        decode_tokens_per_second: tokens of one sequence, median; None if it was not measured.
        decode_tokens_per_second_low: first quartile; None if it is not known.
        decode_tokens_per_second_high: third quartile.
        peak_memory_bytes: the most memory in use; None if it was not measured.
        machine: what it ran on.
    """

    query_aware: bool
    kl: Estimate | None
    perplexity: Estimate | None
    compression_ratio: float
    cache_bytes_before: float
    cache_bytes_after: float
    context_tokens: float
    cut_contexts: int | None
    cut_tokens: int | None
    prefill_seconds: float
    press_seconds: float | None
    decode_tokens_per_second: float | None
    decode_tokens_per_second_low: float | None
    decode_tokens_per_second_high: float | None
    peak_memory_bytes: int | None
    machine: str = ""

    @property
    def samples(self) -> int | None:
        """Number of samples that were measured; None if none was."""
        return None if (found := self._measured) is None else found.samples

    @property
    def contexts(self) -> int | None:
        """Number of contexts that were measured; None if none was."""
        return None if (found := self._measured) is None else found.contexts

    @property
    def _measured(self) -> Estimate | None:
        return self.score or self.kl or self.perplexity

    @property
    def speeds(self) -> tuple[float | None, float | None, float | None]:
        """Decoded tokens per second: median, first and third quartile; None if not known."""
        low, high = self.decode_tokens_per_second_low, self.decode_tokens_per_second_high
        return self.decode_tokens_per_second, low, high

    def to_json(self) -> dict[str, object]:
        """Return the fields as metrics.json has them; unknown bounds of intervals are null."""
        return {"schema": SCHEMA, **{f.name: plain(getattr(self, f.name)) for f in fields(self)}}

    def write(self, folder: Path) -> None:
        """Write metrics.json into a folder of results."""
        write_atomically(folder / METRICS, json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Metrics":
        """Read metrics.json of a folder of results, also as version 0.1.0 wrote it.

        Raises:
            CachepressError: if it is missing, damaged, or written by a later version.
        """
        path = folder / METRICS
        values = read_mapping(path)
        try:
            check_schema(values)
        except ValueError as error:
            raise CachepressError(f"{path}: {error}") from error
        return read_fields(cls, path, values)


def predictions_of(
    table: pd.DataFrame, answers: Mapping[int, Answer], ratio: float
) -> pd.DataFrame:
    """Join a data set, without its contexts, with answers, costs and scores.

    Args:
        table: the data set, by sample id.
        answers: an answer for each sample id.
        ratio: the nominal ratio.
    """
    names = [f.name for f in fields(Answer)]
    told = {i: [getattr(answer, name) for name in names] for i, answer in answers.items()}
    # A column of texts of its own kind would not take half of a surrogate pair.
    recorded = pd.DataFrame.from_dict(told, orient="index", columns=names, dtype=object)
    about = table.drop(columns=["context", *PROMPTING], errors="ignore")
    joined = about.join(recorded)
    scores = pd.Series(scores_in(joined), index=joined.index, dtype=float)
    return joined.assign(score=scores, compression_ratio=ratio)


def scores_in(table: pd.DataFrame) -> list[float]:
    """Score each answer of a table of predictions."""
    names = ("predicted_answer", "answer", "choices", "metric")
    return [score(*texts) for texts in zip(*(table[name] for name in names), strict=True)]


def score(prediction: str, answer: Sequence[str], choices: Sequence[str], metric: str) -> float:
    """Score an answer; NaN if no metric judges it."""
    return math.nan if metric in UNJUDGED else METRIC_REGISTRY[metric](prediction, answer, choices)


def metrics_of(predictions: pd.DataFrame, query_aware: bool) -> Metrics:
    """Compute quality with intervals, bytes and seconds of an evaluation.

    Costs are of all contexts; medians where they are seconds, since a machine is never quiet.

    Args:
        predictions: what ``predictions_of`` gave.
        query_aware: whether the press saw the question.
    """
    numbers = predictions.loc[:, list(_COSTS)].astype(float)
    contexts = numbers.groupby(predictions["context_id"]).mean()
    known = {name: list(contexts[name].dropna()) for name in _COSTS}
    median = {name: statistics.median(x) if x else None for name, x in known.items()}
    speeds = {name: 1 / x if (x := median[name]) else None for name in _COSTS}
    cuts = known["cut_tokens"] if len(known["cut_tokens"]) == len(contexts) else None
    return Metrics(
        **vars(scores_of(predictions)),
        query_aware=query_aware,
        kl=_estimate(positive_interval, predictions, "kl"),
        perplexity=_perplexity(predictions),
        compression_ratio=1 - sum(known["rows_held"]) / sum(known["rows_seen"]),
        cache_bytes_before=statistics.fmean(known["bytes_before"]),
        cache_bytes_after=statistics.fmean(known["bytes_after"]),
        context_tokens=statistics.fmean(known["context_tokens"]),
        cut_contexts=None if cuts is None else sum(x > 0 for x in cuts),
        cut_tokens=None if cuts is None else round(sum(cuts)),
        prefill_seconds=statistics.median(known["prefill_seconds"]),
        press_seconds=median["press_seconds"],
        decode_tokens_per_second=speeds["step_seconds"],
        decode_tokens_per_second_low=speeds["step_seconds_high"],
        decode_tokens_per_second_high=speeds["step_seconds_low"],
        peak_memory_bytes=int(max(known["peak_memory_bytes"], default=0)) or None,
        machine=", ".join(sorted(set(predictions["machine"]))),
    )


def scores_of(predictions: pd.DataFrame) -> Scores:
    """Compute mean scores with intervals, of all samples and of each task."""
    by_task = {str(task): rows for task, rows in predictions.groupby("task", sort=False)}
    tasks = {task: _estimate(estimate, rows, "score") for task, rows in by_task.items()}
    reported = {task: found for task, rows in by_task.items() if (found := _reported(rows))}
    return Scores(
        metrics=sorted(set(predictions["metric"])),
        score=_estimate(estimate, predictions, "score"),
        tasks={task: found for task, found in tasks.items() if found is not None},
        reported=reported,
    )


def _estimate(
    method: Callable[[Sequence[float], Sequence[Hashable]], Estimate],
    predictions: pd.DataFrame,
    column: str,
) -> Estimate | None:
    """Estimate the mean of a column without its missing values; None if all are missing."""
    rows = predictions.dropna(subset=[column])
    return method(list(rows[column]), list(rows["context_id"])) if len(rows) else None


def _perplexity(predictions: pd.DataFrame) -> Estimate | None:
    nll = _estimate(interval, predictions, "nll")
    if nll is None:
        return None
    low, high = (math.inf if x == math.inf else math.exp(x) for x in (nll.low, nll.high))
    return replace(nll, mean=math.exp(nll.mean), low=low, high=high)


def _reported(rows: pd.DataFrame) -> dict[str, Estimate]:
    """Compute what the benchmark reports of a task beside the score."""
    metrics = set(rows["metric"])
    reports = REPORTS.get(metrics.pop(), {}) if len(metrics) == 1 else {}
    found = {}
    for name, report in reports.items():
        try:
            found[name] = _weighted(rows, report)
        except CachepressError as error:
            logger.info("%s is not reported: %s", name, error)
    return found


def _weighted(rows: pd.DataFrame, report: Report) -> Estimate:
    """Compute a report's weighted mean, with the interval of a ratio of means (delta method)."""
    columns = zip(rows["predicted_answer"], rows["answer"], rows["choices"], strict=True)
    scores = [report.metric(*row) for row in columns]
    weights = [report.weight(answer) if report.weight else 1 for answer in rows["answer"]]
    mean = statistics.fmean(scores, weights)
    # The mean of these is that mean, and their variance that of the ratio of two sums.
    share = [weight * len(weights) / sum(weights) for weight in weights]
    linear = [mean + w * (score - mean) for w, score in zip(share, scores, strict=True)]
    return replace(estimate(linear, list(rows["context_id"])), mean=mean)
