"""SCBench in its original format: turns on one context, and the official scorer's numbers."""

import json
from textwrap import indent

import huggingface_hub
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerFast

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.tasks.scbench import LANGUAGES, SCBENCH
from tests.evaluation.tasks.test_builtin import words_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
FIRST_ONLY = "<user>{{ messages[0].content }}<assistant>"
ADD = "def add(left, right):\n    total = left + right\n    return total"
SCALE = "def scale(values, factor):\n    return [value * factor for value in values]"
CLOSE = (
    "def close(self):\n    if self.handle is not None:\n        self.handle.close()\n"
    "        self.handle = None"
)


def turn(question, answer, **more):
    return {"input": question, "answer": answer, **more}


SESSIONS = {
    "scbench_kv": {"context": '{"a1": "b1"}', "multi_turns": [turn("Key a1:", "b1")] * 2},
    "scbench_prefix_suffix": {"input": "xay xby", "multi_turns": [turn("x and y?", "xay")]},
    "scbench_vt": {"context": "VAR A = 1.", "multi_turns": [turn("Which are 1?", ["A", "B"])]},
    "scbench_repoqa": {
        "context": "# file a.py",
        "lang": "python",
        "repo": "one/repo",
        "multi_turns": [
            turn("It adds.", ADD, name="add"),
            turn("It scales.", SCALE, name="scale"),
        ],
    },
    "scbench_qa_eng": {"context": "A book.", "multi_turns": [turn("Who?", "Ada")] * 2},
    "scbench_qa_chn": {"context": "书", "multi_turns": [turn("谁?", "小明")]},
    "scbench_choice_eng": {
        "context": "A book.",
        "multi_turns": [turn("Who?", "Bo", options=["Al", "Bo", "Cy", "Di"])] * 2,
    },
    "scbench_many_shot": {"context": "Q A", "multi_turns": [turn("Pick\n(A) x\n(B) y", "B")]},
    "scbench_summary": {"context": "A paper.", "multi_turns": [turn("Sum it up.", "It is good.")]},
    "scbench_mf": {
        "context": [3, 14, 15],
        "multi_turns": [turn("The largest is ", 15), turn("The least is ", 3)],
    },
    "scbench_summary_with_needles": {
        "context": "A paper.",
        "multi_turns": [
            turn("Sum it up.", "It is good.", task="scbench_summary"),
            turn("The pass key?", "71432", task="scbench_passkey"),
        ],
    },
    "scbench_repoqa_and_kv": {
        "context": "# file a.rs",
        "lang": "rust",
        "repo": "two/repo",
        "multi_turns": [
            turn("It makes one.", "fn one() -> i32 {\n    1\n}", task="scbench_repoqa", name="one"),
            turn("Key a1:", "b1", task="scbench_kv", name=None),
        ],
    },
}
LIMITS = {
    "scbench_kv": {150},
    "scbench_prefix_suffix": {150},
    "scbench_vt": {30},
    "scbench_repoqa": {1024},
    "scbench_qa_eng": {40},
    "scbench_qa_chn": {40},
    "scbench_choice_eng": {40},
    "scbench_many_shot": {10},
    "scbench_summary": {200},
    "scbench_mf": {5},
    "scbench_summary_with_needles": {800, 15},
    "scbench_repoqa_and_kv": {1024, 80},
}
# What the reference answer of each turn scores; a character of two has an F1 of 2/3.
PERFECT = {"scbench_qa_chn": 2 / 3}


def chat_tokenizer(template=CHATML) -> PreTrainedTokenizerFast:
    tokenizer = words_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def load(part, folder, tokenizer=None):
    config = EvaluationConfig(dataset="scbench", data_dir=part, data_path=folder)
    return SCBENCH.table(config, tokenizer or words_tokenizer())


def write(path, *sessions):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(session)}\n" for session in sessions))


def saved(folder, part):
    write(folder / f"{part}.jsonl", SESSIONS[part])
    return str(folder)


def test_there_are_twelve_parts():
    assert set(SCBENCH.parts) == set(SESSIONS) and len(SCBENCH.parts) == 12


@pytest.mark.parametrize("part", SESSIONS)
def test_turns_share_one_context_and_the_reference_is_right(tmp_path, part):
    table = load(part, saved(tmp_path, part))
    session = SESSIONS[part]
    assert len(table) == len(session["multi_turns"])
    assert table["context"].nunique() == 1
    assert table["context"][0].endswith(str(session.get("context") or session["input"]))
    assert set(table["max_new_tokens"]) == LIMITS[part]
    for row, asked in zip(table.itertuples(), session["multi_turns"], strict=True):
        assert asked["input"] in row.question
        reference = asked["answer"]
        if isinstance(reference, list):
            reference = " ".join(reference)
        judge = SCBENCH.metrics[row.metric]
        assert judge(str(reference), row.answer, row.choices) == PERFECT.get(part, 1)
        assert judge("", row.answer, row.choices) == 0


def test_a_mixed_part_names_the_task_of_each_turn(tmp_path):
    part = "scbench_summary_with_needles"
    table = load(part, saved(tmp_path, part))
    assert list(table["task"]) == [f"{part}/scbench_summary", f"{part}/scbench_passkey"]
    assert list(table["max_new_tokens"]) == [800, 15]
    assert list(table["metric"]) == ["scbench_rouge_lsum", "scbench_first_number"]


def test_earlier_turns_stand_before_a_question_in_the_chat_template(tmp_path):
    table = load("scbench_mf", saved(tmp_path, "scbench_mf"), chat_tokenizer())
    assert table["question"][0] == "\n\nThe largest is "
    # No thinking stands before an answer that is given already.
    assert table["question"][1] == (
        "\n\nThe largest is <|im_end|>\n<|im_start|>assistant\n15<|im_end|>\n<|im_start|>user\n"
        "The least is "
    )


def test_an_earlier_answer_begins_as_the_answer_asked_for(tmp_path):
    folder = saved(tmp_path, "scbench_qa_eng")
    first, second = load("scbench_qa_eng", folder, chat_tokenizer())["question"]
    assert first == "\n\nQuestion: Who?\n"
    assert second == (
        f"{first}<|im_end|>\n<|im_start|>assistant\nAnswer: Ada<|im_end|>\n<|im_start|>user\n"
        "Question: Who?\n"
    )
    plain = load("scbench_qa_eng", folder)
    assert list(plain["question"]) == [first, f"{first}Answer: Ada\n\nQuestion: Who?\n"]
    assert list(plain["answer_prefix"]) == ["Answer:"] * 2


def test_three_turns_are_a_conversation(tmp_path):
    asked = [turn(f"Key a{i}:", f"b{i}") for i in range(3)]
    write(tmp_path / "scbench_kv.jsonl", {"context": "{}", "multi_turns": asked})
    third = load("scbench_kv", str(tmp_path), chat_tokenizer())["question"][2]
    chat = [
        {"role": role, "content": content}
        for role, content in [
            ("user", "\n\nKey a0:"),
            ("assistant", "b0"),
            ("user", "Key a1:"),
            ("assistant", "b1"),
            ("user", "Key a2:"),
        ]
    ]
    whole = chat_tokenizer().apply_chat_template(chat, tokenize=False)
    assert whole == f"<|im_start|>user\n{third}<|im_end|>\n"


def test_a_template_that_drops_turns_is_refused(tmp_path):
    with pytest.raises(cp.CachepressError, match="template drops an earlier turn"):
        load("scbench_kv", saved(tmp_path, "scbench_kv"), chat_tokenizer(FIRST_ONLY))


def test_options_are_lettered_and_text_or_letter_is_right(tmp_path):
    part = "scbench_choice_eng"
    table = load(part, saved(tmp_path, part))
    assert "Question: Who?\nA. Al\nB. Bo\nC. Cy\nD. Di\n" in table["question"][0]
    assert list(table["answer"]) == [["Bo", "B"]] * 2
    assert "The right answer is Bo\n\n" in table["question"][1]


def test_a_function_is_judged_among_all_of_its_repository(tmp_path):
    one = SESSIONS["scbench_repoqa"]
    again = {**one, "multi_turns": [turn("It closes.", CLOSE, name="close")]}
    far = {**one, "repo": "far/repo", "lang": "go", "multi_turns": [turn("?", "func", name="f")]}
    write(tmp_path / "scbench_repoqa.jsonl", one, again, far)
    table = load("scbench_repoqa", str(tmp_path))
    assert list(table["choices"]) == [[ADD, SCALE, CLOSE]] * 3 + [["func"]]
    assert list(table["answer"]) == [[ADD], [SCALE], [CLOSE], ["func"]]
    assert list(table["metric"]) == ["scbench_function_python"] * 3 + ["scbench_function_go"]


@pytest.mark.parametrize("name", ["{}.parquet", "{}/test-00000-of-00001.parquet"])
@pytest.mark.parametrize("part", ["scbench_mf", "scbench_vt", "scbench_choice_eng"])
def test_from_parquet_as_from_lines(tmp_path, part, name):
    path = tmp_path / name.format(part)
    path.parent.mkdir(exist_ok=True)
    pd.DataFrame([SESSIONS[part]]).to_parquet(path)
    lines = tmp_path / "lines"
    write(lines / f"{part}.jsonl", SESSIONS[part])
    assert load(part, str(tmp_path)).equals(load(part, str(lines)))


def test_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(tmp_path / "scbench_kv.jsonl")

    saved(tmp_path, "scbench_kv")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(load("scbench_kv", None)) == 2
    assert asked == [("microsoft/SCBench", "data/scbench_kv.jsonl", "dataset")]


@pytest.mark.parametrize(
    ("part", "session"),
    [
        ("scbench_kv", {"context": "x"}),
        ("scbench_kv", {"context": "x", "multi_turns": [{"input": "y"}]}),
        ("scbench_mf", {"context": ["x"], "multi_turns": [turn("y", 1)]}),
        ("scbench_choice_eng", {"context": "x", "multi_turns": [turn("y", "z", options=["z"])]}),
        ("scbench_repoqa", {**SESSIONS["scbench_repoqa"], "lang": "cobol"}),
        ("scbench_repoqa_and_kv", {"context": "x", "multi_turns": [turn("y", "z", task="t")]}),
    ],
)
def test_another_format_is_one_clear_line(tmp_path, part, session):
    write(tmp_path / f"{part}.jsonl", session)
    message = f"{part}.jsonl is not in SCBench's format"
    with pytest.raises(cp.CachepressError, match=message) as caught:
        load(part, str(tmp_path))
    assert "\n" not in str(caught.value)


# The scores are those of compute_scores.py in microsoft/MInference, scbench.
@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "score"),
    [
        ("substring", "The value is b1.", ["b1"], 1),
        ("substring", "The value is B1.", ["b1"], 0),
        ("any", " it was ADA lovelace", ["Ada"], 1),
        ("any", "Byron", ["Ada"], 0),
        ("any", "(B) y", ["B"], 1),
        ("all", "a and c", ["A", "B", "C"], 0.67),
        ("all", "none", ["VAR"], 0),
        ("value", "It is 15.", ["15"], 1),
        ("value", "15.7", ["15"], 1),
        ("value", "-15", ["15"], 1),
        ("value", "-15", ["-15"], 0),
        ("value", "15.5 or so", ["15.5"], 1),
        ("value", "15", ["15.5"], 0),
        ("value", "fifteen", ["15"], 0),
        ("choice", "B. Bo", ["Bo", "B"], 1),
        ("choice", "Bo", ["Bo", "B"], 1),
        ("choice", "Di", ["Bo", "B"], 0),
        ("choice", "I think the answer is Bo", ["Bo", "B"], 1),
        ("choice", "the answer is", ["Bo", "B"], 0),
        ("choice", "surely B, not C", ["Bo", "B"], 1),
        ("best_character", "小明", ["小明"], 0.6666666666666666),
        ("best_character", "他是小明。", ["小明"], 0.4),
        ("best_character", "明", ["小明"], 1),
        ("best_character", "无", ["小明"], 0),
        ("first_number", "Key 71432, not 5.", ["71432"], 1),
        ("first_number", "5, not 71432", ["71432"], 0),
        (
            "rouge_lsum",
            "It is good.\nIt is short.",
            ["It is short.\nIt is bad."],
            0.8333333333333334,
        ),
        ("rouge_lsum", "Papers", ["paper"], 0),
    ],
)
def test_scores_are_the_official_ones(metric, prediction, answers, score):
    assert SCBENCH.metrics[f"scbench_{metric}"](prediction, answers, []) == pytest.approx(
        score, abs=1e-12
    )


# The scores are those of repo_qa_utils.py in microsoft/MInference, scbench, at 0.8.
@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (f"Here it is:\n```python\n{CLOSE}\n```\nDone.", 1),
        (f"```python\n{CLOSE.replace('= None', '= 0')}\n```", 1),
        ("```python\ndef close(self):\n    handle = self.handle\n    handle.close()\n```", 0),
        (f"```python\n{SCALE}\n```", 0),
        (CLOSE, 1),
        (f"```python\nimport os\n\nclass File:\n{indent(CLOSE, '    ')}\n```", 1),
        (f"```python\n{CLOSE[:-8]}", 0),
        (f"```\nx = 1\n```\n```python\n{CLOSE}\n```", 1),
        ("", 0),
    ],
)
def test_a_function_has_to_be_repeated_well(prediction, score):
    judge = SCBENCH.metrics["scbench_function_python"]
    assert judge(prediction, [CLOSE], [ADD, SCALE, CLOSE]) == score


SOURCES = {
    "python": ("import os\n\n@wraps\n", "def f(a):\n    return [a, a + 1, a + 2]", "\n"),
    "java": ("class A {\n  int x;\n  ", "public int f(int a) { return a + x * 2; }", "\n}\n"),
    "typescript": ("const h = () => 1;\nexport ", "function f(a: number) { return a + 1; }", "\n"),
    "rust": ("struct A;\nimpl A { ", "pub fn f(&self) -> i32 { self.a + 1 }", " }\nfn g() {}\n"),
    "cpp": ("int A::m() { return 0; }\nint *p() { return 0; }\n", "int f(int a) { return a; }", ""),
    "go": ("package a\nfunc (t T) m() {}\n", "func f(a int) int { return a + 1 }", "\n"),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_first_function_of_each_language_is_found(language):
    before, function, after = SOURCES[language]
    judge = SCBENCH.metrics[f"scbench_function_{language}"]
    block = f"```{language}\n{before}{function}{after}\n```"
    assert judge(block, [function], [function]) == 1
    assert judge(f"{before}{function}{after}", [function], [function]) == 0
