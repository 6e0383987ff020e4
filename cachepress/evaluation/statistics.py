"""How sure a mean score is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    names = list(dict.fromkeys(contexts))
    mean, clusters = float(values.mean()), len(names)
    residuals = dict.fromkeys(names, 0.0)
    for value, name in zip(values.tolist(), contexts, strict=True):
        residuals[name] += value - mean
    variance = sum(r * r for r in residuals.values()) / len(values) ** 2
    variance *= clusters / max(clusters - 1, 1)
    spread = mean * (1 - mean)
    effective = spread / variance if variance > 0 and spread > 0 else clusters
    low, high = _wilson(mean, min(effective, len(values)))
    return Estimate(mean, low, high, len(values), clusters)


def _wilson(mean: float, n: float) -> tuple[float, float]:
    factor = Z_95**2 / n
    centre = (mean + factor / 2) / (1 + factor)
    half = Z_95 * math.sqrt(mean * (1 - mean) / n + factor / (4 * n)) / (1 + factor)
    return max(0.0, round(centre - half, 12)), min(1.0, round(centre + half, 12))
