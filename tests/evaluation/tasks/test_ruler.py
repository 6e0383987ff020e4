"""RULER as its scripts write it, old and new, and as the hub has it; scores as its scorer's."""

import json

import huggingface_hub
import pandas as pd
import pytest

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.tasks.ruler import KINDS, RULER

NIAH = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\nHay.\nOne of the special magic numbers for blue-fox "
    "is: 1234567.\nHay.\n"
)
NIAH_QUESTION = "What is the special magic number for blue-fox mentioned in the provided text?"
NIAH_PREFIX = "The special magic number for blue-fox mentioned in the provided text is"
MANY = (
    "Some special magic numbers are hidden within the following text.\nOne of the special magic "
    "numbers for red-owl is: 1.\n"
)
MANY_QUESTION = "What are all the special magic numbers for red-owl, and old-elk mentioned in it?"
MANY_PREFIX = "The special magic numbers for red-owl, and old-elk mentioned in it are"
CHAIN = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
CHAIN_QUESTION = "Question: Find all variables that are assigned the value {} in the text above."
CHAIN_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, 2 variables are "
    "assigned the value {}, they are: "
)
EXAMPLE = (
    f"{CHAIN}VAR A = 11\n{CHAIN_QUESTION.format(11)} {CHAIN_PREFIX.format(11)} A B\n\n\n\n{CHAIN}"
)
WORDS = "Below is a numbered list of words. In these words, some appear more often than others.\n"
WORDS_QUESTION = "Question: What are the 10 most common words in the above list?"
WORDS_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
CODED = "Read the following coded text and track the frequency of each coded word. ... ab ab cd\n"
CODED_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
CODED_PREFIX = "Answer: According to the coded text above, the three words are:"
ORDER = "Answer the question based on the given documents. Only give me the answer."
DOCUMENTS = f"{ORDER}\n\nThe following are given documents.\n\nDocument 1:\nIt is by Ada.\n\n"
DOCUMENTS_QUESTION = f"{ORDER}\n\nQuestion: In the Answer: who wrote it?"

TEXTS = {
    "niah_single_1": (NIAH, NIAH_QUESTION, NIAH_PREFIX),
    "niah_multiquery": (MANY, MANY_QUESTION, MANY_PREFIX),
    "vt": (EXAMPLE + "VAR C = 22\n", CHAIN_QUESTION.format(22), CHAIN_PREFIX.format(22)),
    "cwe": (
        f"{WORDS}1. a 2. b\n{WORDS_QUESTION} {WORDS_PREFIX} 1. a 2. b\n{WORDS}1. c 2. d\n",
        WORDS_QUESTION,
        WORDS_PREFIX,
    ),
    "fwe": (CODED, CODED_QUESTION, CODED_PREFIX),
    "qa_1": (DOCUMENTS, DOCUMENTS_QUESTION, "Answer:"),
}
OWN = {"index": 0, "outputs": ["x", "y"], "length": 77}


def load(part, folder=None):
    config = EvaluationConfig(dataset="ruler", data_dir=part, data_path=folder and str(folder))
    return RULER.table(config, None)


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize("task", TEXTS)
def test_a_text_is_split_where_the_question_begins(tmp_path, task):
    context, question, prefix = TEXTS[task]
    whole = {**OWN, "input": f"{context}{question} {prefix}"}
    apart = {**OWN, "input": context + question, "answer_prefix": f" {prefix}"}
    write(tmp_path / task / "validation.jsonl", whole, apart)
    table = load(task, tmp_path)
    assert list(table["context"]) == [context] * 2
    assert list(table["question"]) == [f"{question} "] * 2
    assert list(table["answer_prefix"]) == [prefix] * 2
    assert list(table["answer"]) == [["x", "y"]] * 2
    assert list(table["length"]) == [77] * 2
    assert list(table["task"]) == [task] * 2


def test_a_text_without_line_breaks_is_split_too(tmp_path):
    text = " ".join(f"{NIAH}{NIAH_QUESTION} {NIAH_PREFIX}".split())
    write(tmp_path / "niah_single_3" / "validation.jsonl", {**OWN, "input": text})
    row = load("niah_single_3", tmp_path).iloc[0]
    assert row["context"] == " ".join(NIAH.split()) + " "
    assert row["question"] == f"{NIAH_QUESTION} "
    assert row["answer_prefix"] == NIAH_PREFIX


def test_a_text_without_the_beginning_of_an_answer_has_none(tmp_path):
    write(tmp_path / "vt" / "validation.jsonl", {**OWN, "input": CHAIN + CHAIN_QUESTION})
    row = load("vt", tmp_path).iloc[0]
    assert (row["context"], row["question"]) == (CHAIN, CHAIN_QUESTION)
    assert row["answer_prefix"] == ""


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("4096", "{}/validation.jsonl"),
        ("4096/data", "{}/validation.jsonl"),
        ("4096", "{}.jsonl"),
    ],
)
def test_a_length_is_a_folder_and_alone_means_all_tasks(tmp_path, folder, file):
    for task, kind in KINDS.items():
        name = task if task in TEXTS else "qa_1" if task == "qa_2" else "niah_single_1"
        context, question, prefix = TEXTS[name]
        row = {**OWN, "input": f"{context}{question} {prefix}"}
        write(tmp_path / folder / file.format(task), row)
        assert load(f"4096/{task}", tmp_path)["max_new_tokens"][0] == kind.max_new_tokens
    table = load("4096", tmp_path)
    assert list(table["task"]) == list(KINDS)
    assert len(KINDS) == 13
    assert list(table["max_new_tokens"]) == [128] * 8 + [30, 120, 50, 32, 32]
    assert list(table["metric"]) == ["ruler_all"] * 11 + ["ruler_part"] * 2
    assert load(None, tmp_path / folder).equals(table)


HUB_ROWS = [
    {
        "context": NIAH,
        "question": NIAH_QUESTION,
        "answer_prefix": NIAH_PREFIX,
        "answer": ["1234567"],
        "task": "niah_single_1",
        "max_new_tokens": 128,
    },
    {
        "context": DOCUMENTS,
        "question": DOCUMENTS_QUESTION,
        "answer_prefix": "Answer:",
        "answer": ["Ada", "Ada Lovelace"],
        "task": "qa_1",
        "max_new_tokens": 32,
    },
]


def test_the_hub_has_the_parts_apart(tmp_path, monkeypatch):
    file = tmp_path / "4096" / "test-00000-of-00001.parquet"
    file.parent.mkdir()
    pd.DataFrame(HUB_ROWS).to_parquet(file)
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    table = load("4096")
    assert asked == [("simonjegou/ruler", "4096/test-00000-of-00001.parquet", "dataset")]
    columns = list(HUB_ROWS[0])
    assert table[columns].to_dict("records") == HUB_ROWS
    assert list(table["metric"]) == ["ruler_all", "ruler_part"]
    assert list(table["length"]) == [4096, 4096]
    assert load("4096", tmp_path).equals(table)
    assert load("4096/qa_1", tmp_path)[columns].to_dict("records") == HUB_ROWS[1:]
    with pytest.raises(cp.CachepressError, match="no rows of the task vt"):
        load("4096/vt", tmp_path)


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "score"),
    [
        ("ruler_all", " 1234567.", ["1234567"], 100.0),
        ("ruler_all", "1. abc 2. DEF", ["ABC", "def", "ghi"], 66.67),
        ("ruler_all", "none", ["ABC", "def"], 0.0),
        ("ruler_all", "ab\tcd", ["ab\tcd", "ab\ncd"], 50.0),
        ("ruler_all", "\x00ab\x1f", ["\nab", "ab"], 50.0),
        ("ruler_part", "by ada", ["Ada", "Ada Lovelace"], 100.0),
        ("ruler_part", "by Bob", ["Ada", "Ada Lovelace"], 0.0),
        ("ruler_part", "ab\tcd", ["ab\tcd"], 0.0),
    ],
)
def test_scores_are_those_of_the_benchmark(metric, prediction, answers, score):
    """Its scorer rounds to two decimals, of a hundred."""
    assert round(100 * RULER.metrics[metric](prediction, answers, []), 2) == score


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("4k", "got data_dir='4k', wanted a length, a task or length/task"),
        ("long/vt", "got data_dir='long/vt'"),
        ("4096/nothing", "got data_dir='4096/nothing'"),
        ("8192/vt", "has no file 8192/vt/validation.jsonl or 8192/data/vt/validation.jsonl"),
        ("vt", "vt/validation.jsonl, row 1: the input starts with '\\[INST\\] Memorize and"),
        ("cwe", "cwe/validation.jsonl, row 0: the input has no question in RULER's own words"),
        ("qa_1", "qa_1/validation.jsonl, row 0: the input has no question"),
        ("fwe", "fwe/validation.jsonl is not in RULER's format: no 'outputs'"),
        ("qa_2", "qa_2/validation.jsonl is damaged"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(tmp_path, part, message):
    good = {**OWN, "input": CHAIN + CHAIN_QUESTION}
    chat = {**OWN, "input": f"[INST] {CHAIN}{CHAIN_QUESTION} [/INST]"}
    write(tmp_path / "vt" / "validation.jsonl", good, chat)
    write(tmp_path / "cwe" / "validation.jsonl", {**OWN, "input": f"{WORDS}1. a\nWhich?"})
    write(tmp_path / "qa_1" / "validation.jsonl", {**OWN, "input": ORDER})
    write(tmp_path / "fwe" / "validation.jsonl", {"input": CODED + CODED_QUESTION, "length": 1})
    write(tmp_path / "qa_2" / "validation.jsonl")
    (tmp_path / "qa_2" / "validation.jsonl").write_text("{broken")
    with pytest.raises(cp.CachepressError, match=message) as caught:
        load(part, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [None, "vt"])
def test_the_hub_wants_a_length(part):
    with pytest.raises(cp.CachepressError, match="wanted a length such as 4096 or 4096/vt"):
        load(part)


def test_a_table_of_other_columns_is_refused(tmp_path):
    (tmp_path / "4096").mkdir()
    table = pd.DataFrame(HUB_ROWS).drop(columns="answer")
    table.to_parquet(tmp_path / "4096" / "test-00000-of-00001.parquet")
    with pytest.raises(cp.CachepressError, match="no 'answer'"):
        load("4096", tmp_path)
