"""LongBench v2 in its original format, and its scores as its own scorer's."""

import json

import huggingface_hub
import pytest

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.tasks.longbench_v2 import LONGBENCH_V2

ROW = {
    "_id": "66f36490821e116aacb2cc22",
    "domain": "Single-Document QA",
    "sub_domain": "Literary",
    "difficulty": "easy",
    "length": "short",
    "question": " Who {wrote} it?\n",
    "choice_A": "Ada ",
    "choice_B": "Bob",
    "choice_C": "{Cy}",
    "choice_D": "Dan",
    "answer": "A",
    "context": "\nIt was written by {Ada}.\n\n",
}
ROWS = [
    ROW,
    ROW | {"difficulty": "hard", "question": "Who did not?", "answer": "D"},
    ROW | {"difficulty": "hard", "length": "long", "context": "Other.", "answer": "C"},
    ROW | {"length": "medium", "answer": "B"},
]


def load(part, folder):
    config = EvaluationConfig(dataset="longbench-v2", data_dir=part, data_path=folder)
    return LONGBENCH_V2.table(config, None)


def test_rows_from_a_local_folder(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    table = load(None, str(tmp_path))
    assert table["context"][0].endswith("\n\n<text>\nIt was written by {Ada}.\n</text>\n\n")
    assert table["question"][0].startswith("Which answer to this question is correct?\nWho {wrote}")
    assert "it?\n\n(A) Ada\n(B) Bob\n(C) {Cy}\n(D) Dan\n\n" in table["question"][0]
    assert table["question"][0].endswith('"The correct answer is (X)".')
    assert list(table["answer"]) == [["A"], ["D"], ["C"], ["B"]]
    assert list(table["task"]) == ["easy-short", "hard-short", "hard-long", "easy-medium"]
    assert list(table["choices"]) == [["A", "B", "C", "D"]] * 4
    assert list(table["answer_prefix"]) == [""] * 4
    assert list(table["max_new_tokens"]) == [128] * 4
    assert list(table["length"]) == [None] * 4
    assert list(table["metric"]) == ["longbench_v2_choice"] * 4


def test_questions_on_one_text_share_its_context(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    assert load(None, str(tmp_path))["context"].nunique() == 2


@pytest.mark.parametrize(
    ("part", "answers"),
    [("easy", "AB"), ("hard", "DC"), ("short", "AD"), ("medium", "B"), ("long", "C")],
)
def test_a_part_is_a_difficulty_or_a_length(tmp_path, part, answers):
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    assert list(load(part, str(tmp_path))["answer"]) == [[letter] for letter in answers]


def test_from_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(tmp_path / "data.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load(None, None).equals(load(None, str(tmp_path)))
    assert asked == [("THUDM/LongBench-v2", "data.json", "dataset")]


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The correct answer is (A).", "A", 1),
        ("The correct answer is (B).", "A", 0),
        ("**The correct answer is (*C*)**", "C", 1),
        ("The correct answer is D", "D", 1),
        ("The correct answer is Dan", "D", 1),
        ("The correct answer is B. No: The correct answer is (C)", "C", 1),
        ("The correct answer is (A) or The correct answer is (B)", "B", 0),
        ("The correct answer is  (A)", "A", 0),
        ("the correct answer is (A)", "A", 0),
        ("The correct answer is (E)", "E", 0),
        ("(A)", "A", 0),
        ("", "A", 0),
    ],
)
def test_scores_are_those_of_the_benchmark(prediction, answer, score):
    metric = LONGBENCH_V2.metrics["longbench_v2_choice"]
    assert metric(prediction, [answer], ["A", "B", "C", "D"]) == score


@pytest.mark.parametrize(
    ("part", "rows", "message"),
    [
        ("tiny", ROWS, "got data_dir='tiny', wanted nothing or one of easy, hard, short"),
        ("long", [ROW], "data.json has no rows of the part long"),
        (None, [{"context": "x"}], "not in LongBench v2's format: KeyError"),
        (None, [ROW | {"answer": "E"}], "not in LongBench v2's format: .*answer is 'E'"),
        (None, [ROW | {"length": 7}], "not in LongBench v2's format: .*length is 7"),
        (None, [ROW | {"choice_B": None}], "not in LongBench v2's format"),
        (None, ["x"], "data.json is damaged"),
        (None, [], "has no rows"),
        (None, None, "has no file data.json"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(tmp_path, part, rows, message):
    if rows is not None:
        (tmp_path / "data.json").write_text(json.dumps(rows))
    with pytest.raises(cp.CachepressError, match=message) as caught:
        load(part, str(tmp_path))
    assert "\n" not in str(caught.value)
