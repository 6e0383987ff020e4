"""InfiniteBench in its original format; every score is the one that the official scorer gives."""

import json

import huggingface_hub
import pytest

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.tasks.infinitebench import INFINITEBENCH, PARTS

UUID = "0b1c2d3e-0000-4444-8888-123456789abc"
SUMMARY = "Ada builds a mill by the river.\nHer brother sells it."
PIPES = ["open_valve", "close_valve", "read_gauge", "pump.start"]
BOOKS = ["The mill", "The B road", "On sea", "Nowhere"]
ROWS = {
    "passkey": {"input": "What is the pass key?", "answer": ["71432"]},
    "number_string": {"input": "What is the sequence of digits?", "answer": "0022001122"},
    "kv_retrieval": {"input": f'Key: "k"\nIts value is: "{UUID}"', "answer": UUID},
    "longbook_sum_eng": {"input": "", "answer": [SUMMARY]},
    "longbook_choice_eng": {"input": "Where is it?", "answer": ["On sea"], "options": BOOKS},
    "longbook_qa_eng": {"input": "Who built it?", "answer": ["Ada", "Ada Byron"]},
    "longbook_qa_chn": {"input": "谁建的？", "answer": ["艾达·拜伦", "她"]},  # noqa: RUF001
    "longdialogue_qa_eng": {"input": "Which character is $$MASK$$ ?", "answer": ["ADA", "BY"]},
    "math_find": {"input": "The largest number of the list is: ", "answer": 42},
    "math_calc": {"input": "", "answer": [[79, 59, 0, 103]]},
    "code_run": {"input": "Please give me func_7(-3), as a number.", "answer": [-14]},
    "code_debug": {"input": "", "answer": "read_gauge", "options": PIPES},
}
SCORES = {
    "passkey": [(" 71432.", 1), ("key 7 71432", 0), ("071432", 0), ("none", 0), ("", 0)],
    "number_string": [(" 0022001122", 1), ("22001122", 0), ("0022001122 3", 1)],
    "kv_retrieval": [(f'"{UUID}"', 1), (f"it is:{UUID}!", 1), (UUID[:-1], 0), (f"({UUID})", 0)],
    "longbook_sum_eng": [
        (SUMMARY, 1),
        ("Her brother sells a mill.\nAda builds by the river.", 0.9523809523809523),
        ("Her brother sells a mill. Ada builds by the river.", 0.761904761904762),
        ("", 0),
    ],
    "longbook_choice_eng": [
        (" C. On sea", 1),
        ("D", 0),
        ("On sea", 1),
        ("A ship", 0),
        ("the answer is: On sea", 1),
        ("the answer is:", 0),
        ("I think the option is C, surely", 1),
        ("maybe CD or C", 0),
        ("maybe (C)", 0),
        ("it says: C", 1),
        ("", 0),
    ],
    "longbook_qa_eng": [("The Byron, Ada!", 1), ("a mill", 0), ("Ada of Kent", 0.5)],
    "longbook_qa_chn": [
        ("艾达 拜伦。", 0.888888888888889),
        ("是她建的", 0.4),
        ("「」", 0),
        ("不知道", 0),
    ],
    "longdialogue_qa_eng": [(" ada:", 1), ("By", 0), ("Adam", 0), ("It's 'Ada', he said", 1)],
    "math_find": [(" 42", 1), ("-42", 1), ("4", 0), ("about 42 or 43", 1), ("none", 0)],
    "math_calc": [
        ("[79, 59, 0, 103]", 1),
        ("79 059 1 103", 0.5),
        ("[-79, 59", 0.5),
        ("79, 59, 0, 103, 5", 1),
        ("[10, 79]", 0),
        ("", 0),
    ],
    "code_run": [(" -14.", 1), ("It returns: `-14`", 1), ("-14 is it", 0), ("14", 0), (" ", 0)],
    "code_debug": [
        (" C.", 1),
        ("C: it", 1),
        ("C", 0),
        ("The correct option is: C", 1),
        ("**Answer is:** `read_gauge`", 1),
        ("the error is: B, not C.", 0),
        ("answer is:", 0),
    ],
}


def write(folder, task, *rows):
    lines = [json.dumps({"id": i, "context": f"Text of {task}.", **r}) for i, r in enumerate(rows)]
    (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def load(task, folder):
    config = EvaluationConfig(dataset="infinitebench", data_dir=task, data_path=folder)
    return INFINITEBENCH.table(config, None)


def test_every_task_has_a_row_and_scores_here():
    assert list(ROWS) == list(SCORES) == list(INFINITEBENCH.parts)


@pytest.mark.parametrize(
    ("task", "prediction", "score"),
    [(task, *case) for task, cases in SCORES.items() for case in cases],
)
def test_a_prediction_scores_as_officially(tmp_path, task, prediction, score):
    write(tmp_path, task, ROWS[task])
    row = load(task, str(tmp_path)).iloc[0]
    judge = INFINITEBENCH.metrics[row["metric"]]
    assert judge(prediction, row["answer"], row["choices"]) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "texts", "prediction"),
    [(42, ["42"], "42"), ([2.5], ["2.5"], "2.5"), (7.0, ["7.0"], "7")],
)
def test_a_number_may_have_decimals(tmp_path, answer, texts, prediction):
    write(tmp_path, "math_find", ROWS["math_find"] | {"answer": answer})
    row = load("math_find", str(tmp_path)).iloc[0]
    assert row["answer"] == texts
    assert INFINITEBENCH.metrics[row["metric"]](prediction, texts, []) == 1


def test_a_number_that_is_too_long_to_convert_is_only_wrong():
    score = INFINITEBENCH.metrics["infinitebench_leading_numbers"]
    assert score("7 " + "9" * 5000, ["7", "9"], []) == 0.5


@pytest.mark.parametrize("answer", ["read_gauge", ["read_gauge"], ["read_gauge", "C"]])
def test_the_label_of_a_choice_has_its_letter(tmp_path, answer):
    write(tmp_path, "code_debug", ROWS["code_debug"] | {"answer": answer})
    assert load("code_debug", str(tmp_path))["answer"][0] == ["read_gauge", "C"]


def test_the_text_comes_before_and_what_is_asked_after(tmp_path):
    for task in ("longbook_choice_eng", "code_run", "math_calc", "longbook_qa_chn"):
        write(tmp_path, task, ROWS[task], ROWS[task])
    choice = load("longbook_choice_eng", str(tmp_path))
    assert choice["context"][0] == choice["context"][1]
    assert choice["context"][0].endswith("\n\nText of longbook_choice_eng.")
    assert "Where is it?" not in choice["context"][0]
    assert "Question: Where is it?" in choice["question"][0]
    assert choice["question"][0].endswith("A. The mill\nB. The B road\nC. On sea\nD. Nowhere\n")
    assert list(choice["max_new_tokens"]) == [40, 40]
    run = load("code_run", str(tmp_path))
    assert "What exactly does func_7(-3) return?" in run["question"][0]
    assert run["answer_prefix"][0] == "The value of func_7(-3) is"
    calc = load("math_calc", str(tmp_path))
    assert calc["context"][0] == "Expression: Text of math_calc."
    assert (calc["answer"][0], calc["max_new_tokens"][0]) == (["79", "59", "0", "103"], 30000)
    chinese = load("longbook_qa_chn", str(tmp_path))
    assert "问题：谁建的？\n" in chinese["question"][0]  # noqa: RUF001
    assert chinese["answer_prefix"][0] == "答案："  # noqa: RUF001


def test_from_the_hub(tmp_path, monkeypatch):
    write(tmp_path, "passkey", ROWS["passkey"])
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load("passkey", None)["answer"][0] == ["71432"]
    assert asked == [("xinrongzhang2022/InfiniteBench", "passkey.jsonl", "dataset")]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("passkey", {"answer": None, "context": 3}, "passkey.jsonl is not in InfiniteBench's"),
        ("code_run", {"input": "What is it?"}, "no call in 'What is it[?]'"),
        ("code_debug", {"answer": "another"}, "code_debug.jsonl is not in InfiniteBench's format"),
        ("code_debug", {"answer": ["read_gauge", "E"]}, "not in InfiniteBench's format"),
        ("longbook_choice_eng", {"options": BOOKS[:3]}, "not in InfiniteBench's format"),
        ("longbook_qa_eng", {"answer": []}, "longbook_qa_eng.jsonl, row 0: the answer is empty"),
    ],
)
def test_another_format_is_one_clear_line(tmp_path, task, row, message):
    write(tmp_path, task, ROWS[task] | row)
    with pytest.raises(cp.CachepressError, match=message) as caught:
        load(task, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_limits_are_those_of_the_benchmark():
    limits = [part.max_new_tokens for part in PARTS.values()]
    assert limits == [6, 12, 50, 1200, 40, 40, 40, 40, 3, 30000, 5, 5]
