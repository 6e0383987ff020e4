import pytest

from cachepress.evaluation.metrics import qa_f1, string_match


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
