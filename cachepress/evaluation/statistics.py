"""How sure a mean is, and how two runs on the same samples differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import t

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean score with its 95 % interval.

    Attributes:
        mean: mean over the samples, 0 to 1.
        low: lower end of the interval.
        high: upper end of the interval.
        samples: number of samples.
        contexts: number of contexts; samples of one context are not independent.
    """

    mean: float
    low: float
    high: float
    samples: int
    contexts: int


def estimate(scores: Sequence[float], contexts: Sequence[object]) -> Estimate:
    """Mean and 95 % interval, clustered by context.

    The interval is Wilson's, with the number of samples replaced by the effective one: the number
    of independent samples that would give the cluster-robust variance of the mean. Where that
    variance is 0 (all samples alike) it is the number of contexts, so that ten right answers on
    two contexts do not look like certainty.

    Args:
        scores: one score from 0 to 1 a sample.
        contexts: which context each sample belongs to.
    """
    values = np.asarray(scores, dtype=float)
    mean, clusters = float(values.mean()), len(set(contexts))
    variance = _variance(values - mean, contexts)
    spread = mean * (1 - mean)
    # Sums of residuals that cancel out leave a trace of rounding.
    sure = clusters == 1 or variance < 1e-12 or spread <= 0
    effective = clusters if sure else spread / variance
    low, high = _wilson(mean, min(effective, len(values)))
    return Estimate(mean, low, high, len(values), clusters)


def interval(values: Sequence[float], contexts: Sequence[object]) -> Estimate:
    """Mean of any numbers and its 95 % interval, clustered by context.

    The interval is Student's, with one degree of freedom less than there are contexts. A single
    context says nothing about others: its interval is infinite.
    """
    numbers = np.asarray(values, dtype=float)
    mean, clusters = float(numbers.mean()), len(set(contexts))
    half = math.inf
    if clusters > 1:
        half = t.ppf(0.975, clusters - 1) * math.sqrt(_variance(numbers - mean, contexts))
    return Estimate(mean, mean - half, mean + half, len(numbers), clusters)


@dataclass(frozen=True)
class Paired:
    """How a run differs from another one on the same samples.

    Attributes:
        difference: of the scores, the other's subtracted.
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
    run, base = run[run["score"].notna()], base[base["score"].notna()]
    ids = run.index.intersection(base.index)
    run, base = run.loc[ids], base.loc[ids]
    right, was = run["score"] >= 0.5, base["score"] >= 0.5
    difference = interval(list(run["score"] - base["score"]), list(run["context_id"]))
    if math.isfinite(difference.low):
        # Scores are from 0 to 1, which Student's interval does not know.
        low, high = max(-1.0, difference.low), min(1.0, difference.high)
        difference = replace(difference, low=low, high=high)
    return Paired(
        difference=difference,
        flips=float((right != was).mean()),
        same=float((run["predicted_answer"] == base["predicted_answer"]).mean()),
    )


def _variance(residuals: np.ndarray, contexts: Sequence[object]) -> float:
    """Cluster-robust variance of a mean."""
    sums: dict[object, float] = {}
    for value, name in zip(residuals.tolist(), contexts, strict=True):
        sums[name] = sums.get(name, 0.0) + value
    clusters = len(sums)
    variance = sum(x * x for x in sums.values()) / len(residuals) ** 2
    return variance * clusters / max(clusters - 1, 1)


def _wilson(mean: float, n: float) -> tuple[float, float]:
    factor = Z_95**2 / n
    centre = (mean + factor / 2) / (1 + factor)
    half = Z_95 * math.sqrt(mean * (1 - mean) / n + factor / (4 * n)) / (1 + factor)
    return max(0.0, round(centre - half, 12)), min(1.0, round(centre + half, 12))
