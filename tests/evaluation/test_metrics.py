import random

import pytest

from cachepress.evaluation.metrics import qa_f1, string_match
from cachepress.evaluation.statistics import estimate


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("It is 7391842.", ["7391842"], 1.0),
        ("PARIS and rome", ["Paris", "Rome", "Oslo"], 2 / 3),
        ("", ["x"], 0.0),
    ],
)
def test_string_match(prediction, answers, score):
    assert string_match(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1.0),
        ("It is the Eiffel Tower", ["Eiffel Tower"], 2 / 3),
        ("one two", ["two three", "one"], 2 / 3),
        ("nothing shared", ["at all"], 0.0),
        ("", ["x"], 0.0),
    ],
)
def test_qa_f1(prediction, answers, score):
    assert qa_f1(prediction, answers) == pytest.approx(score)


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
