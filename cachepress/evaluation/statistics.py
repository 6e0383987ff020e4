"""Estimates means with confidence intervals, and compares two runs on the same samples."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import pandas as pd

from cachepress.evaluation import intervals
from cachepress.evaluation.intervals import Bounds, Clusters
from cachepress.evaluation.typed import NULL


@dataclass(frozen=True)
class Estimate:
    """Mean score with its 95 % interval.

    Attributes:
        mean: mean over the samples, 0 to 1.
        low: lower end of the interval.
        high: upper end of the interval.
        samples: number of samples.
        contexts: number of contexts; samples of one context are not independent.
    """

    mean: float
    low: float = field(metadata={NULL: math.nan})
    high: float = field(metadata={NULL: math.nan})
    samples: int
    contexts: int


def estimate(scores: Sequence[float], contexts: Sequence[Hashable]) -> Estimate:
    """Estimate the mean of scores from 0 to 1 with its 95 % interval, clustered by context.

    Zeros and ones, fractions and anything between: see ``cachepress.evaluation.intervals.scores``.
    A single context is one sample, however many questions it has.

    Args:
        scores: one score from 0 to 1 a sample.
        contexts: which context each sample belongs to.
    """
    return _one(intervals.scores, scores, contexts)


def interval(values: Sequence[float], contexts: Sequence[Hashable]) -> Estimate:
    """Estimate the mean of any numbers with its 95 % interval, clustered by context.

    The interval is Student's, with one degree of freedom less than there are contexts. A single
    context says nothing about others: its interval is infinite.
    """
    return _one(intervals.student, values, contexts)


def positive_interval(values: Sequence[float], contexts: Sequence[Hashable]) -> Estimate:
    """Estimate the mean of non-negative numbers, such as divergences, with its 95 % interval.

    The interval is never below 0, and longer upwards: see
    ``cachepress.evaluation.intervals.positive``. That of a single context is infinite.
    """
    return _one(intervals.positive, values, contexts)


@dataclass(frozen=True)
class Paired:
    """Paired comparison of two runs on the same samples.

    Attributes:
        difference: of the scores, the other's subtracted; see
            ``cachepress.evaluation.intervals.differences``.
        flips: share of samples that are right in one and wrong in the other; right is a score of
            at least a half.
        same: share of samples with the very same answer.
    """

    difference: Estimate
    flips: float
    same: float


def paired(run: pd.DataFrame, base: pd.DataFrame) -> Paired:
    """Compare two runs sample by sample.

    Args:
        run: a row for each sample, by sample id, with score, context_id and predicted_answer.
        base: the run to compare with; only samples of both count.
    """
    run, base = run.dropna(subset=["score"]), base.dropna(subset=["score"])
    ids = run.index.intersection(base.index)
    run, base = run.loc[ids], base.loc[ids]
    pairs = list(zip(run["score"], base["score"], strict=True))
    answers = zip(run["predicted_answer"], base["predicted_answer"], strict=True)
    differences = [score - other for score, other in pairs]
    return Paired(
        difference=_one(intervals.differences, differences, list(run["context_id"])),
        flips=fmean((score >= 0.5) != (other >= 0.5) for score, other in pairs),
        same=fmean(answer == other for answer, other in answers),
    )


def finite(value: float | None) -> float | None:
    """Return a number if it is finite, else None."""
    return value if value is not None and math.isfinite(value) else None


def _one(
    method: Callable[[np.ndarray, Clusters], Bounds],
    values: Sequence[float],
    contexts: Sequence[Hashable],
) -> Estimate:
    """Apply an interval for many data sets to one."""
    clusters = Clusters.of(contexts)
    mean, low, high = (float(x[0]) for x in method(np.asarray([values], dtype=float), clusters))
    return Estimate(mean, low, high, len(values), len(clusters.sizes))
