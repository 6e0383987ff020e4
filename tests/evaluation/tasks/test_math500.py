"""MATH-500 in its original format, and answers that mean the same."""

import json
import threading

import huggingface_hub
import pytest

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.tasks.math500 import MATH500, math_verify

ROWS = [
    {
        "problem": "Write half of $x$.",
        "solution": "It is $\\boxed{\\frac{x}{2}}$.",
        "answer": "\\frac{x}{2}",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/algebra/1.json",
    },
    {
        "problem": "Which point is it?",
        "solution": "It is $\\boxed{(1,2)}$.",
        "answer": "(1,2)",
        "subject": "Geometry",
        "level": 5,
        "unique_id": "test/geometry/2.json",
    },
]


def load(folder):
    return MATH500.table(EvaluationConfig(dataset="math500", data_path=folder), None)


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize("name", ["math500.jsonl", "test.jsonl"])
def test_the_problem_with_its_instruction_is_the_context(tmp_path, name):
    write(tmp_path / name, ROWS)
    table = load(str(tmp_path))
    assert table["context"][0].endswith("inside \\boxed{}.\n\nWrite half of $x$.")
    assert list(table["question"]) == ["", ""]
    assert list(table["answer"]) == [["\\frac{x}{2}"], ["(1,2)"]]
    assert list(table["task"]) == ["Algebra", "Geometry"]
    assert set(table["metric"]) == {"math_verify"}
    assert set(table["max_new_tokens"]) == {4096}


def test_from_the_hub(tmp_path, monkeypatch):
    write(tmp_path / "test.jsonl", ROWS)
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(tmp_path / "test.jsonl")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(load(None)) == 2
    assert asked == [("HuggingFaceH4/MATH-500", "test.jsonl", "dataset")]


def test_another_format_is_one_clear_line(tmp_path):
    write(tmp_path / "math500.jsonl", [{"problem": "x", "answer": "1"}])
    with pytest.raises(cp.CachepressError, match="not in MATH-500's format: KeyError") as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("boxed", "answer", "score"),
    [
        ("0.5", "\\frac{1}{2}", 1),
        ("\\dfrac12", "\\frac{1}{2}", 1),
        ("\\frac{1}{3}", "\\frac{1}{2}", 0),
        ("(3, \\pi/2)", "\\left( 3, \\frac{\\pi}{2} \\right)", 1),
        ("(\\pi/2, 3)", "\\left( 3, \\frac{\\pi}{2} \\right)", 0),
        ("-q+p", "p - q", 1),
        ("[-2,7]", "x \\in [-2,7]", 1),
        ("90", "90^\\circ", 1),
        ("11111", "11,\\! 111", 1),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", 1),
        ("C", "\\text{(C)}", 1),
        ("\\text{Evelyn}", "\\text{Evelyn}", 1),
        ("\\text{Carla}", "\\text{Evelyn}", 0),
        ("-2, 1", "1,-2", 1),
        ("\\text{70}", "70", 1),
        ("n = 70", "70", 1),
        ("70.0", "70", 1),
        ("070", "70", 1),
        ("\\frac{140}{2}", "70", 1),
        ("\\$70", "70", 1),
        ("\\frac{141}{2}", "70", 0),
        ("", "3", 0),
    ],
)
def test_the_last_box_may_be_written_in_another_way(boxed, answer, score):
    assert math_verify(f"First \\boxed{{17}}, and so \\boxed{{{boxed}}}.", [answer]) == score


def test_what_is_not_boxed_does_not_count():
    assert math_verify("The answer is $3$.", ["3"]) == 0
    assert math_verify("The answer is \\boxed{3", ["3"]) == 0


def test_a_thread_can_score_too():
    scores = []
    thread = threading.Thread(target=lambda: scores.append(math_verify("\\boxed{2/4}", ["0.5"])))
    thread.start()
    thread.join()
    assert scores == [1]
