"""Intervals cover what they promise, and runs are compared on the same samples."""

import math
import random

import pandas as pd
import pytest

from cachepress.evaluation.statistics import estimate, interval, paired


def test_independent_samples_get_wilsons_interval():
    got = estimate([1.0] * 7 + [0.0] * 3, range(10))
    assert (got.mean, got.samples, got.contexts) == (0.7, 10, 10)
    assert (got.low, got.high) == pytest.approx((0.378, 0.901), abs=0.012)


def test_certainty_is_limited_by_the_number_of_contexts():
    got = estimate([1.0] * 40, [i // 4 for i in range(40)])
    assert (got.mean, got.high) == pytest.approx((1.0, 1.0))
    assert got.low == pytest.approx(0.7225, abs=1e-3)
    none = estimate([0.0] * 40, [i // 4 for i in range(40)])
    assert (none.low, none.high) == pytest.approx((0.0, 0.2775), abs=1e-3)


@pytest.mark.parametrize("scores", [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.4]])
def test_one_context_is_one_sample_whatever_the_rounding(scores):
    got = estimate(scores, [0] * len(scores))
    mean = sum(scores) / len(scores)
    alone = estimate([mean], [0])
    assert (got.low, got.high) == pytest.approx((alone.low, alone.high))


def test_samples_of_one_context_are_not_independent():
    scores = [1.0] * 20 + [0.0] * 20
    apart = estimate(scores, range(40))
    together = estimate(scores, [i // 4 for i in range(40)])
    assert together.mean == apart.mean == 0.5
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    generator, hits, runs = random.Random(0), 0, 600
    for _ in range(runs):
        scores, names = [], []
        for context in range(20):
            p = generator.betavariate(3, 1.5)
            scores += [float(generator.random() < p) for _ in range(4)]
            names += [context] * 4
        got = estimate(scores, names)
        hits += got.low <= 3 / 4.5 <= got.high
    assert 0.92 < hits / runs < 0.98


def test_an_interval_of_any_numbers_is_students_over_contexts():
    got = interval([1.0, 3.0, 2.0, 6.0], ["a", "a", "b", "b"])
    assert (got.mean, got.samples, got.contexts) == (3.0, 4, 2)
    # Means of the two contexts are 2 and 4: half a width is t(0.975, 1) * sqrt(2) / sqrt(2).
    assert got.high - got.mean == pytest.approx(12.7062, rel=1e-4)


def test_one_context_says_nothing_about_others():
    got = interval([0.2, 0.4], [0, 0])
    assert got.mean == pytest.approx(0.3)
    assert (got.low, got.high) == (-math.inf, math.inf)


def test_the_interval_of_numbers_covers_the_truth_about_95_times_in_100():
    generator, hits, runs = random.Random(1), 0, 600
    for _ in range(runs):
        centres = [generator.gauss(5, 1) for _ in range(10)]
        values = [generator.gauss(c, 0.5) for c in centres for _ in range(3)]
        got = interval(values, [i // 3 for i in range(30)])
        hits += got.low <= 5 <= got.high
    assert 0.92 < hits / runs < 0.98


def test_paired_runs_are_compared_sample_by_sample():
    base = pd.DataFrame(
        {"score": [1.0, 1.0, 0.0, 0.0], "predicted_answer": list("abcd")}, index=[3, 1, 2, 0]
    )
    run = pd.DataFrame(
        {
            "score": [0.0, 1.0, 0.6, 1.0],
            "predicted_answer": list("dbxy"),
            "context_id": [0, 0, 1, 1],
        },
        index=[0, 1, 2, 9],
    )
    got = paired(run, base)
    assert got.difference.mean == pytest.approx((0.0 + 0.0 + 0.6) / 3)
    assert (got.difference.samples, got.difference.contexts) == (3, 2)
    assert (got.difference.low, got.difference.high) == (-1.0, 1.0)
    assert got.flips == pytest.approx(1 / 3)
    assert got.same == pytest.approx(2 / 3)
