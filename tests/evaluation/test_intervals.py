"""Intervals cover the truth 95 times in 100, by simulation: 2,000 runs of each setting."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm

from cachepress.evaluation import intervals
from cachepress.evaluation.intervals import Bounds, Clusters

RUNS = 2000
SIZES = [(10, 1), (10, 4), (50, 1), (50, 4)]
TRUE = np.linspace(0.05, 0.95, 10)


def clusters(contexts: int, questions: int) -> Clusters:
    return Clusters.of([i // questions for i in range(contexts * questions)])


def tied(contexts: int, questions: int, share: float, seed: int) -> np.ndarray:
    """Uniform numbers, those of a context correlated."""
    generator = np.random.default_rng(seed)
    common = generator.normal(size=(RUNS, contexts, 1))
    own = generator.normal(size=(RUNS, contexts, questions))
    return norm.cdf(np.sqrt(share) * common + np.sqrt(1 - share) * own).reshape(RUNS, -1)


def ones(contexts: int, questions: int, true: float, seed: int = 0) -> np.ndarray:
    return (tied(contexts, questions, 0.3, seed) < true).astype(float)


def alike(contexts: int, questions: int, true: float, seed: int = 0) -> np.ndarray:
    """Contexts whose questions are all answered, or none."""
    return (tied(contexts, questions, 1.0, seed) < true).astype(float)


def fractions(
    contexts: int, questions: int, true: float, seed: int = 0, narrow: float = 5
) -> np.ndarray:
    """Beta numbers around a centre that is drawn for each context."""
    generator = np.random.default_rng(seed)
    shape = (RUNS, contexts, 1)
    centre = generator.beta(true * 2 * narrow, (1 - true) * 2 * narrow, shape)
    centre = np.clip(centre, 1e-6, 1 - 1e-6)
    a, b = (np.broadcast_to(x * narrow, (RUNS, contexts, questions)) for x in (centre, 1 - centre))
    return generator.beta(a, b).reshape(RUNS, -1)


def coverage(found: Bounds, true: float) -> float:
    assert np.isfinite([found.low, found.high]).all()
    assert (found.low <= found.mean).all() and (found.mean <= found.high).all()
    return float(((found.low <= true + 1e-12) & (found.high >= true - 1e-12)).mean())


def width(found: Bounds, least: float) -> float:
    return float((np.minimum(found.high, 1) - np.maximum(found.low, least)).mean())


def check_width(
    found: Bounds, values: np.ndarray, together: Clusters, true: float, least: float = 0.0
) -> None:
    """At most 1.5 times Student's, where that covers; of length 0 it covers nothing."""
    student = intervals.student(values, together)
    long = student.high - student.low > 1e-9
    if coverage(student, true) - np.mean(~long) >= 0.93:
        assert width(found, least) <= 1.5 * width(student, least)


@pytest.mark.parametrize("kind", [ones, alike, fractions])
@pytest.mark.parametrize("contexts,questions", SIZES)
def test_scores_of_every_size_are_covered(contexts, questions, kind: Callable):
    together, covered = clusters(contexts, questions), []
    for seed, true in enumerate(TRUE):
        values = kind(contexts, questions, true, seed)
        found = intervals.scores(values, together)
        covered.append(coverage(found, true))
        assert found.low.min() >= 0 and found.high.max() <= 1
        check_width(found, values, together, true)
    assert min(covered) >= 0.90, dict(zip(TRUE, covered, strict=True))
    assert 0.93 <= np.mean(covered) <= 0.98, covered


SKEWED = {
    "near 0": lambda g, shape: (g.beta(0.1, 1.9, shape), 0.05),
    "near 1": lambda g, shape: (1 - g.beta(0.25, 4.75, shape), 0.95),
    "powers": lambda g, shape: (g.random(shape) ** 6, 1 / 7),
    "mostly 0": lambda g, shape: ((g.random(shape) < 0.2) * g.beta(5, 5, shape), 0.1),
    "rarely more than 0": lambda g, shape: (
        (g.random(shape) < 0.05) * g.beta(2, 5, shape),
        0.1 / 7,
    ),
}


@pytest.mark.parametrize("kind", list(SKEWED))
@pytest.mark.parametrize("contexts,questions", SIZES)
def test_skewed_fractions_are_covered(contexts, questions, kind):
    values, true = SKEWED[kind](np.random.default_rng(5), (RUNS, contexts * questions))
    found = intervals.scores(values, clusters(contexts, questions))
    assert coverage(found, true) >= (0.88 if contexts == 10 else 0.92)


@pytest.mark.parametrize("contexts,questions", SIZES)
@pytest.mark.parametrize("lost,won", [(0.0, 0.0), (0.005, 0.005), (0.1, 0.1), (0.02, 0), (0.2, 0)])
def test_differences_of_zeros_and_ones_are_covered(contexts, questions, lost, won):
    together, draw = clusters(contexts, questions), tied(contexts, questions, 0.3, 7)
    values = (draw > 1 - won).astype(float) - (draw < lost)
    found = intervals.differences(values, together)
    assert coverage(found, won - lost) >= 0.93
    assert (found.high - found.low).min() > 0.001
    assert found.low.min() >= -1 and found.high.max() <= 1
    check_width(found, values, together, won - lost, -1.0)


CHANGES = {
    "all a little, 0 %": lambda g, shape: (g.normal(0, 0.05, shape), 0.0),
    "all a little, 2 %": lambda g, shape: (g.normal(-0.02, 0.05, shape), -0.02),
    "all worse, 20 %": lambda g, shape: (-g.beta(2, 8, shape), -0.2),
    "all worse, skewed, 2 %": lambda g, shape: (-g.beta(0.2, 9.8, shape), -0.02),
    "nearly all alike, 2 %": lambda g, shape: (-(g.random(shape) ** 49), -0.02),
    "nearly all alike, 5 %": lambda g, shape: (-g.beta(0.1, 1.9, shape), -0.05),
    "some worse, 20 %": lambda g, shape: ((g.random(shape) < 0.4) * -g.beta(5, 5, shape), -0.2),
    "some worse, 2 %": lambda g, shape: ((g.random(shape) < 0.04) * -g.beta(5, 5, shape), -0.02),
    "either way, 0 %": lambda g, shape: (
        (g.random(shape) < 0.5) * (g.beta(5, 5, shape) - g.beta(5, 5, shape)),
        0.0,
    ),
}


@pytest.mark.parametrize("kind", list(CHANGES))
@pytest.mark.parametrize("contexts,questions", SIZES)
def test_differences_of_fractions_are_covered(contexts, questions, kind):
    values, true = CHANGES[kind](np.random.default_rng(9), (RUNS, contexts * questions))
    together = clusters(contexts, questions)
    found = intervals.differences(values, together)
    assert coverage(found, true) >= 0.93
    assert (found.high - found.low).min() > 0.001
    assert found.low.min() >= -1 and found.high.max() <= 1
    check_width(found, values, together, true, -1.0)


@pytest.mark.parametrize("contexts,questions", SIZES)
def test_divergences_are_covered_and_never_below_zero(contexts, questions):
    values = np.random.default_rng(3).gamma(1.0, 2.0, (RUNS, contexts * questions))
    together = clusters(contexts, questions)
    found = intervals.positive(values, together)
    assert 0.91 <= coverage(found, 2.0) <= 0.97
    assert coverage(found, 2.0) >= coverage(intervals.student(values, together), 2.0) - 0.005
    assert found.low.min() >= 0
    assert (found.high - found.mean > found.mean - found.low).all()


@pytest.mark.parametrize("method", [intervals.scores, intervals.differences])
def test_clusters_of_any_size_are_covered(method):
    sizes = [1, 2, 3, 4, 5] * 4
    together = Clusters.of([name for name, size in enumerate(sizes) for _ in range(size)])
    assert together.effective == pytest.approx(60**2 / (4 * 55))
    generator = np.random.default_rng(11)
    centre = np.repeat(generator.beta(1, 4, (RUNS, len(sizes))), sizes, axis=1)
    values = (generator.random(centre.shape) < centre).astype(float)
    found = method(values if method is intervals.scores else -values, together)
    assert 0.92 <= coverage(found, 0.2 if method is intervals.scores else -0.2) <= 0.99


UNEQUAL = {
    "few large": [1] * 20 + [10] * 10,
    "three large": [1] * 30 + [20] * 3,
    "two sizes": [2] * 25 + [8] * 25,
    "all sizes": [40, 20, 13, 10, 8, 6, 5, 5, 4, 4, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1],
}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sizes", list(UNEQUAL))
def test_clusters_of_very_unequal_sizes_are_covered(sizes, share):
    together = Clusters.of([c for c, size in enumerate(UNEQUAL[sizes]) for _ in range(size)])
    generator = np.random.default_rng(13)
    common = generator.normal(size=(RUNS, len(together.sizes)))
    common = np.repeat(common, UNEQUAL[sizes], axis=1)
    own = generator.normal(size=common.shape)
    draw = norm.cdf(np.sqrt(share) * common + np.sqrt(1 - share) * own)
    for true in (0.05, 0.1, 0.5, 0.9):
        assert coverage(intervals.scores((draw < true).astype(float), together), true) >= 0.93
    worse = -(draw < 0.2).astype(float)
    assert coverage(intervals.differences(worse, together), -0.2) >= 0.93
    tied = intervals.scores(draw**2, together)
    assert coverage(tied, 1 / 3) >= 0.93


@pytest.mark.parametrize("contexts", [1, 2, 5, 200])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 1e-12, 1 - 1e-12])
def test_alike_answers_are_no_certainty(contexts, value):
    together = clusters(contexts, 4)
    values = np.full((1, contexts * 4), value)
    # What all contexts show could still miss a twentieth of them, roughly.
    for found in (intervals.scores(values, together), intervals.differences(values, together)):
        assert np.isfinite(found.high - found.low).all()
    found = intervals.scores(values, together)
    assert found.high[0] - found.low[0] > 3.8 / (contexts + 4) * 0.99
    assert (found.low[0], found.high[0]) != (0, 1) and found.low[0] <= value <= found.high[0]
    none = intervals.differences(np.zeros_like(values), together)
    assert none.high[0] == -none.low[0] > 0.01


def test_zeros_and_ones_of_single_questions_get_wilsons_interval():
    found = intervals.scores(np.array([[1.0] * 6 + [0.0] * 4]), clusters(10, 1))
    n = 0.24 / (0.24 / 9)  # The variance of the mean has a degree of freedom less.
    low, high = intervals.wilson(np.array([0.6]), np.array([n]), intervals.Z_95)
    assert (found.low[0], found.high[0]) == pytest.approx((low[0], high[0]))
    assert (found.low[0], found.high[0]) == pytest.approx((0.30048, 0.83970), abs=1e-4)


def test_the_exact_end_of_zeros_and_ones_is_cloppers_and_pearsons():
    high = intervals.exact_high(np.array([0.0, 0.3]), np.array([0.0, 0.21]), np.array([10.0, 10.0]))
    assert high == pytest.approx([0.30850, 0.65245], abs=1e-5)


def test_narrow_fractions_get_students_interval():
    generator = np.random.default_rng(2)
    values = generator.normal(0.6, 0.03, (5, 80))
    found, student = (f(values, clusters(20, 4)) for f in (intervals.scores, intervals.student))
    assert found.low == pytest.approx(student.low, abs=1e-3)
    assert found.high == pytest.approx(student.high, abs=1e-3)
