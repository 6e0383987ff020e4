"""ROUGE-L is what the package says, for texts that are short enough for it."""

import inspect
import sys
from random import Random

import pytest
from rouge import Rouge as Package

from cachepress.evaluation.registry import METRIC_REGISTRY
from cachepress.evaluation.rouge import rouge_l


def package(prediction, answer):
    scores = Package(metrics=["rouge-l"]).get_scores(prediction, answer)[0]["rouge-l"]
    return scores["r"], scores["p"], scores["f"]


@pytest.mark.parametrize("seed", range(200))
def test_it_is_the_package_s(seed):
    rng = Random(seed)
    words = [*"abcdefgh"[: rng.randint(1, 8)], " ", ".", ". ", "\n"]
    prediction, answer = (
        " ".join(rng.choices(words, k=rng.randint(1, 40))) + rng.choice(["a", " b.", "a. "])
        for _ in range(2)
    )
    assert tuple(rouge_l(prediction, answer)) == package(prediction, answer)


def test_of_several_longest_subsequences_the_package_s_is_taken():
    # Either "a b" or "a c" is one; with the second sentence the union has two words or three.
    assert tuple(rouge_l("a c b. a b", "a b c")) == package("a c b. a b", "a b c")
    assert tuple(rouge_l("a b c. c", "a c b")) == package("a b c. c", "a c b")


@pytest.mark.parametrize("text", ["", ".", "..."])
def test_a_text_without_a_sentence_scores_nothing(text):
    assert tuple(rouge_l(text, "a b")) == (0, 0, 0)
    assert tuple(rouge_l("a b", text)) == (0, 0, 0)


def test_length_and_depth_change_nothing():
    words = [f"w{number}" for number in range(4000)]
    answer, prediction = " ".join(words), " ".join(words[::4])
    expected = (0.25, 1.0, pytest.approx(0.4))
    assert tuple(rouge_l(prediction, answer)) == expected

    def deeper(calls):
        return rouge_l(prediction, answer) if not calls else deeper(calls - 1)

    assert tuple(deeper(sys.getrecursionlimit() - len(inspect.stack()) - 60)) == expected


@pytest.mark.parametrize("name", ["infinitebench_rouge_lsum", "scbench_rouge_lsum"])
def test_the_other_package_knows_no_depth_either(name):
    words = [f"w{number}" for number in range(700)]
    answer, prediction = " ".join(words), " ".join(words[::2])
    metric = METRIC_REGISTRY[name]

    def deeper(calls):
        return metric(prediction, [answer], []) if not calls else deeper(calls - 1)

    shallow = deeper(0)
    assert shallow == pytest.approx(2 / 3)
    assert deeper(sys.getrecursionlimit() - len(inspect.stack()) - 60) == shallow
