"""Confidence intervals (95 %) of mean scores of clustered samples, for many data sets at once.

Every function takes data sets as the rows of an array ``[R, N]``, so that coverage can be tested by
simulation; ``cachepress.evaluation.statistics`` is for one.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.stats import beta, t

Z_95 = 1.959963984540054
TAIL = 0.025
_ROUNDING = 1e-14
"""Sums that cancel out leave a trace, of the variance's size times this at most."""


class Bounds(NamedTuple):
    """Means ``[R]`` with the ends of their intervals."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Trust(NamedTuple):
    """Thresholds of the relative standard error, up to which a sample's variance is trusted.

    Where it is large, the sample may lack the rare large values that the true mean is made of.

    Attributes:
        up_to: the relative standard error up to which the variance is believed.
        none_from: that from which it is not.
    """

    up_to: float
    none_from: float


FRACTIONS = Trust(0.3, 0.6)
"""Of fractions such as ROUGE: that of ten exponentially distributed contexts is 0.32."""
ONES = Trust(0.7, 0.9)
"""Of zeros and ones, whose variance follows from their mean: one context or two differ from all."""
CHANGES = Trust(0.2, 0.4)
"""Of gains and losses that are fractions."""


@dataclass(frozen=True)
class Clusters:
    """Clusters of samples that are not independent, such as the questions about one context.

    Attributes:
        order: ``[N]`` samples, those of a cluster one after the other.
        sizes: ``[C]`` samples of each cluster.
    """

    order: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, names: Sequence[Hashable]) -> "Clusters":
        """Group samples by the ``names`` of their clusters."""
        codes: dict[Hashable, int] = {}
        index = np.asarray([codes.setdefault(name, len(codes)) for name in names])
        return cls(np.argsort(index, kind="stable"), np.bincount(index).astype(float))

    @cached_property
    def samples(self) -> float:
        """Number of samples."""
        return float(self.sizes.sum())

    @cached_property
    def effective(self) -> float:
        """Effective number of clusters (Kish): of different sizes, they count as fewer."""
        return float(self.samples**2 / (self.sizes**2).sum())

    @cached_property
    def even(self) -> bool:
        """Whether all clusters have the same size."""
        return bool((self.sizes == self.sizes[0]).all())

    @cached_property
    def quantile(self) -> float:
        """Student's t quantile for the effective number of clusters."""
        return float(t.ppf(1 - TAIL, max(self.effective - 1, 1.0)))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum values ``[R, N]`` over each cluster, ``[R, C]``."""
        starts = np.cumsum(self.sizes, dtype=int) - self.sizes.astype(int)
        return np.add.reduceat(values[:, self.order], starts, axis=1)


class Moments(NamedTuple):
    """Means and variances that intervals are computed from, ``[R]`` each.

    Attributes:
        mean: mean over the samples.
        variance: of the mean, from differences between clusters (jackknife), of unequal ones at
            least what the correlation within them says; 0 for one cluster.
        spread: variance of a sample.
        independent: number of independent samples whose mean would vary as much.
    """

    mean: np.ndarray
    variance: np.ndarray
    spread: np.ndarray
    independent: np.ndarray


def moments(values: np.ndarray, clusters: Clusters) -> Moments:
    """Compute means and variances of data sets ``[R, N]``."""
    n, sizes = clusters.samples, clusters.sizes
    mean = values.mean(-1)
    spread = ((values - mean[:, None]) ** 2).mean(-1)
    if len(sizes) == 1:
        variance = np.zeros_like(mean)
    else:
        residuals = clusters.sums(values) - mean[:, None] * sizes
        left_out = residuals / (n - sizes)  # What leaving a cluster out does to the mean.
        variance = (left_out**2).sum(-1) * (len(sizes) - 1) / len(sizes)
        if not clusters.even:
            variance = np.maximum(variance, _of_tied(residuals, spread, clusters))
    alike = variance <= _ROUNDING * spread + (_ROUNDING * mean) ** 2
    variance = np.where(alike, 0.0, variance)
    independent = np.clip(spread / np.where(alike, 1.0, variance), clusters.effective, n)
    return Moments(mean, variance, spread, np.where(alike, clusters.effective, independent))


def _of_tied(residuals: np.ndarray, spread: np.ndarray, clusters: Clusters) -> np.ndarray:
    """Compute the variance of the mean ``[R]`` from the intraclass correlation.

    Where the few large clusters happen to agree, the differences between clusters are those of the
    small ones, and say nothing of the large. What all clusters together say of the correlation
    within a cluster does.
    """
    n, sizes = clusters.samples, clusters.sizes
    total, between = spread * n, (residuals**2 / sizes).sum(-1)
    freedom = n - len(sizes)
    within = np.maximum(total - between, 0.0) / freedom
    share = within * n / np.where(total > 0, total, 1.0)
    tie = np.clip(1 - share, 0.0, 1.0)
    independent = n / (1 + (n / clusters.effective - 1) * tie)
    return spread / np.maximum(independent - 1, 1.0)


def student(values: np.ndarray, clusters: Clusters) -> Bounds:
    """Compute Student's t interval over clusters; infinite for a single cluster."""
    found = moments(values, clusters)
    half = clusters.quantile * np.sqrt(found.variance)
    if len(clusters.sizes) == 1:
        half = np.full_like(found.mean, np.inf)
    return Bounds(found.mean, found.mean - half, found.mean + half)


def positive(values: np.ndarray, clusters: Clusters) -> Bounds:
    """Compute the interval of a mean of non-negative numbers, whose variance grows with the mean.

    It has the true means from which the one found is ``quantile`` standard errors away, where the
    squared standard error is as many times the one found as the true mean is. That is Wilson's
    argument without an upper end; the interval is longer upwards, and never below 0.
    """
    found = moments(values, clusters)
    if len(clusters.sizes) == 1:
        return student(values, clusters)
    scale = np.where(found.mean > 0, found.variance / np.where(found.mean > 0, found.mean, 1), 0.0)
    shift = clusters.quantile**2 * scale / 2
    half = clusters.quantile * np.sqrt(
        scale * np.maximum(found.mean, 0) + (shift / clusters.quantile) ** 2
    )
    return Bounds(found.mean, found.mean + shift - half, found.mean + shift + half)


def scores(values: np.ndarray, clusters: Clusters) -> Bounds:
    """Compute the interval of a mean score from 0 to 1, of zeros and ones or of fractions.

    Wilson's interval with the number of samples that gives the variance between clusters, and with
    Student's quantile where that variance is estimated. Of fractions this number can be far above
    that of the samples: the interval is then Student's, and as short. Where the variance cannot be
    trusted (``Trust``), the ends move to those of ``exact_high``.
    """
    found = moments(values, clusters)
    ones = _has_only(values, (0.0, 1.0))
    near = np.minimum(found.mean, 1 - found.mean)
    doubt = _doubt(found, near, _by_kind(ones, ONES, FRACTIONS))
    none = found.independent
    low, high = _end_points(found, clusters, ones, none, doubt, np.ones_like(found.mean))
    return Bounds(found.mean, low, high)


def differences(values: np.ndarray, clusters: Clusters) -> Bounds:
    """Compute the interval of a mean difference of two scores, from -1 to 1, never of length 0.

    Gains and losses are both means of numbers from 0 to 1, most of them 0. Each gets an interval as
    a score does, and the two are combined as those of correlated means are (Zou and Donner 2008).
    Where nothing was gained, or nothing lost, the interval of zeros says how much may have been
    missed: that is what keeps runs apart that agree on all samples by chance. The interval is never
    shorter than Student's.
    """
    if len(clusters.sizes) == 1:
        mean = values.mean(-1)
        return Bounds(mean, np.full_like(mean, -1.0), np.full_like(mean, 1.0))
    whole, changed = moments(values, clusters), moments(np.abs(values), clusters)
    gains, losses = (moments(np.maximum(x, 0), clusters) for x in (values, -values))
    ones = _has_only(values, (-1.0, 0.0, 1.0))
    agree = (values == 0).mean(-1)
    far = _farthest(values, whole, changed, agree)
    unseen = far * np.where(ones, 1.0, agree)
    sides = []
    for side in (gains, losses):
        doubt = _doubt(side, side.mean, _by_kind(ones, ONES, CHANGES))
        low, high = _end_points(side, clusters, ones, changed.independent, doubt, far)
        sides.append((side.mean - low, np.where(side.mean == 0, high * unseen, high) - side.mean))
    (gain_down, gain_up), (loss_down, loss_up) = sides
    tie = _correlation(whole, gains, losses)
    down, up = _combined(gain_down, loss_up, tie), _combined(gain_up, loss_down, tie)
    half = clusters.quantile * np.sqrt(whole.variance)
    low = np.maximum(whole.mean - np.maximum(down, half), -1.0)
    high = np.minimum(whole.mean + np.maximum(up, half), 1.0)
    return Bounds(whole.mean, low, high)


def exact_high(mean: np.ndarray, spread: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Compute an upper bound for the mean of numbers from 0 to 1, whatever their distribution.

    Gaffke's bound: the samples and one more, at 1, get random weights that sum to 1, and the end is
    the quantile of their mean; here by a beta distribution with the same mean and variance. Of
    zeros and ones it is Clopper's and Pearson's.
    """
    centre = (n * mean + 1) / (n + 1)
    variance = ((n * (spread + mean**2) + 1) / (n + 1) - centre**2) / (n + 2)
    certain = (1 - centre < 1e-9) | (variance <= 0)
    total = centre * (1 - centre) / np.where(certain, 1.0, variance) - 1
    b = np.where(certain, 1.0, (1 - centre) * total)
    # Below this, nearly all of the distribution is at 1.
    certain |= b < 1e-6
    high = beta.ppf(1 - TAIL, np.where(certain, 1.0, centre * total), np.where(certain, 1.0, b))
    return np.where(certain, 1.0, high)


def _end_points(
    found: Moments,
    clusters: Clusters,
    ones: np.ndarray,
    of_zeros: np.ndarray,
    doubt: np.ndarray,
    far: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the bounds of means from 0 to 1: Wilson's, widened to exact ones with ``doubt``.

    Args:
        found: of the data sets.
        clusters: their clusters.
        ones: ``[R]`` which data sets are of zeros and ones.
        of_zeros: number of samples to take where all are alike.
        doubt: from 0 for none to 1.
        far: the largest number that a sample can be.
    """
    if len(clusters.sizes) == 1:
        one, none = np.ones_like(found.mean), np.zeros_like(found.mean)
        return 1 - exact_high(1 - found.mean, none, one), exact_high(found.mean, none, one)
    room = found.mean * (1 - found.mean)
    alike = (found.variance == 0) | (room <= _ROUNDING)
    n = np.where(alike, of_zeros, room / np.where(alike, 1.0, found.variance))
    # Where the zeros and ones of a cluster are all alike they say as much as one, and the variance
    # of single ones follows from their mean.
    single = found.spread <= found.variance * (len(clusters.sizes) - 1) * (1 + 1e-9)
    known = alike | (ones & single & clusters.even)
    low, high = wilson(found.mean, n, np.where(known, Z_95, clusters.quantile))
    doubt = np.where(alike, 0.0, doubt)
    mean, spread = found.mean / far, found.spread / far**2
    exact_low = far * (1 - exact_high(1 - mean, spread, found.independent))
    low += doubt * (exact_low - low)
    high += doubt * (far * exact_high(mean, spread, found.independent) - high)
    return np.minimum(low, found.mean), np.maximum(high, found.mean)


def wilson(
    mean: np.ndarray, n: np.ndarray, quantile: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the bounds of Wilson's interval."""
    factor = np.square(quantile) / n
    centre = (mean + factor / 2) / (1 + factor)
    half = quantile * np.sqrt(mean * (1 - mean) / n + factor / (4 * n)) / (1 + factor)
    return np.maximum(0.0, np.round(centre - half, 12)), np.minimum(
        1.0, np.round(centre + half, 12)
    )


def _has_only(values: np.ndarray, allowed: tuple[float, ...]) -> np.ndarray:
    """Tell which data sets have no other values than ``allowed``."""
    return np.asarray(np.isin(values, allowed).all(-1))


def _by_kind(ones: np.ndarray, of_ones: Trust, others: Trust) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.where(ones, of_ones.up_to, others.up_to),
        np.where(ones, of_ones.none_from, others.none_from),
    )


def _doubt(found: Moments, near: np.ndarray, trust: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Compute from 0 to 1 how little the variance is trusted, by the relative standard error."""
    up_to, none_from = trust
    relative = np.sqrt(found.variance) / np.where(near > 0, near, 1.0)
    return np.where(near > 0, np.clip((relative - up_to) / (none_from - up_to), 0.0, 1.0), 0.0)


def _farthest(
    values: np.ndarray, whole: Moments, changed: Moments, agree: np.ndarray
) -> np.ndarray:
    """Bound how far the scores of two runs may differ on a sample that was not drawn.

    Of ``k`` changes the largest was found, and another is larger with probability
    ``1 / (k + 1)``: it moves that far on to 1, if most samples agree or all changes go one way,
    the large ones rare. Where no sample changed, anything is possible.

    ``k`` is the number of equal and independent changes whose sum would vary as much: those that
    are next to nothing, and those that a context repeats, say little of how large another can be.
    """
    sizes = np.abs(values)
    squares, largest = (sizes**2).sum(-1), sizes.max(-1)
    k = sizes.sum(-1) ** 2 / np.where(squares > 0, squares, 1.0)
    k *= changed.independent / values.shape[-1]
    one_way = np.abs(whole.mean) / np.where(changed.mean > 0, changed.mean, 1.0)
    skewed = one_way * _doubt(changed, changed.mean, (np.array(CHANGES[0]), np.array(CHANGES[1])))
    far = largest + (1 - largest) * np.maximum(agree, skewed) / (k + 1)
    return np.where(k == 0, 1.0, far)


def _correlation(whole: Moments, gains: Moments, losses: Moments) -> np.ndarray:
    """Compute the correlation of the means of gains and losses."""
    covariance = (gains.variance + losses.variance - whole.variance) / 2
    scale = np.sqrt(gains.variance * losses.variance)
    return np.where(scale > 0, np.clip(covariance / np.where(scale > 0, scale, 1.0), -1, 1), 0.0)


def _combined(a: np.ndarray, b: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    """Combine the errors ``a`` and ``b`` of two means into that of their difference."""
    return np.sqrt(np.maximum(a**2 + b**2 - 2 * correlation * a * b, 0.0))
