"""AIME 2025 in its original format, and the number in the last box."""

import json

import huggingface_hub
import pytest

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.tasks.aime25 import AIME25, boxed_integer
from cachepress.evaluation.tasks.boxed import last_boxed

ROWS = [
    {"problem": "Find $1+1$. ", "answer": "2", "id": "0"},
    {"problem": "Find the angle {in degrees}.", "answer": "336^\\circ", "id": "1"},
]


def load(folder):
    return AIME25.table(EvaluationConfig(dataset="aime25", data_path=folder), None)


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize("name", ["aime25.jsonl", "test.jsonl"])
def test_the_problem_with_its_instruction_is_the_context(tmp_path, name):
    write(tmp_path / name, ROWS)
    table = load(str(tmp_path))
    assert table["context"][0].endswith("inside \\boxed{}.\n\nFind $1+1$.")
    assert table["context"][1].endswith("\n\nFind the angle {in degrees}.")
    assert list(table["question"]) == ["", ""]
    assert list(table["answer"]) == [["2"], ["336^\\circ"]]
    assert set(table["metric"]) == {"boxed_integer"}
    assert set(table["task"]) == {"aime25"}
    assert set(table["max_new_tokens"]) == {32768}


def test_from_the_hub(tmp_path, monkeypatch):
    write(tmp_path / "test.jsonl", ROWS)
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(tmp_path / "test.jsonl")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(load(None)) == 2
    assert asked == [("math-ai/aime25", "test.jsonl", "dataset")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "aime25.jsonl is not in AIME25's format: KeyError\\('problem'\\)"),
        ({"problem": 1, "answer": "1"}, "not in AIME25's format"),
        ({"problem": "x", "answer": "1/2"}, "row 0: the answer '1/2' is not a whole number"),
    ],
)
def test_another_format_is_one_clear_line(tmp_path, row, message):
    write(tmp_path / "aime25.jsonl", [row])
    with pytest.raises(cp.CachepressError, match=message) as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("so \\boxed{70}.", "70"),
        ("\\boxed{1} and then \\boxed {2}", "2"),
        ("\\boxed{\\frac{1}{2}} }", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{1} or \\boxed{\\frac{2}", None),
        ("70", None),
    ],
)
def test_the_last_box(text, inside):
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The sum is $\\boxed{70}$.", "70", 1),
        ("\\boxed{71}, no: \\boxed{70}", "70", 1),
        ("\\boxed{70}, no: \\boxed{71}", "70", 0),
        ("\\boxed{ 070 }", "70", 1),
        ("\\boxed{70.0}", "70", 1),
        ("\\boxed{70.5}", "70", 0),
        ("\\boxed{\\text{70}}", "70", 1),
        ("\\boxed{\\text{70}^\\circ}", "70^\\circ", 1),
        ("\\boxed{n = 70}", "70", 1),
        ("\\boxed{m+n=70}", "70", 1),
        ("\\boxed{n = 71}", "70", 0),
        ("\\boxed{\\frac{140}{2}}", "70", 1),
        ("\\boxed{\\frac{141}{2}}", "70", 0),
        ("\\boxed{7 \\cdot 10}", "70", 1),
        ("\\boxed{\\$70}", "70", 1),
        ("\\boxed{70\\%}", "70", 1),
        ("\\boxed{70 \\text{ cm}}", "70", 1),
        ("\\boxed{\\mathbf{70}}", "070", 1),
        ("\\boxed{70 or 71}", "70", 0),
        ("\\boxed{70\u00b0}", "70", 1),
        ("\\text{70} is \\boxed{x}", "70", 0),
        ("\\boxed{-70}", "70", 0),
        ("\\boxed{0}", "000", 1),
        ("\\boxed{}", "0", 0),
        ("\\boxed{336}", "336^\\circ", 1),
        ("\\boxed{336^{\\circ}}", "336^\\circ", 1),
        ("the answer is 70", "70", 0),
        ("", "70", 0),
    ],
)
def test_only_the_same_number_counts(prediction, answer, score):
    assert boxed_integer(prediction, [answer]) == score
