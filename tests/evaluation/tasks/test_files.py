import json

import pandas as pd
import pytest

import cachepress as cp
from cachepress.evaluation.tasks.base import COLUMNS
from cachepress.evaluation.tasks.files import load_file

ROWS = [
    {"context": "a", "question": "b", "answer": ["c", "d"], "max_new_tokens": 7},
    {"context": "a", "question": "", "answer": ["e"], "max_new_tokens": 8},
]


def save(path, rows):
    if path.suffix == ".csv":
        pd.DataFrame(rows).assign(answer=[json.dumps(r["answer"]) for r in rows]).to_csv(
            path, index=False
        )
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json", "t.parquet"])
def test_every_format_gives_the_same_table(tmp_path, name):
    path = tmp_path / name
    save(path, ROWS)
    table = load_file(path)
    assert tuple(table.columns) == COLUMNS
    assert list(table["answer"]) == [["c", "d"], ["e"]]
    assert list(table["question"]) == ["b", ""]
    assert list(table["max_new_tokens"]) == [7, 8]
    assert list(table["task"]) == ["t", "t"]
    assert list(table["answer_prefix"]) == ["", ""]


def test_an_empty_limit_is_the_default(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("context,question,answer,max_new_tokens\na,b,c,7\na,b,c,\n")
    assert list(load_file(path)["max_new_tokens"]) == [7, 50]
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"context": "a", "question": "b", "answer": "c", "max_new_tokens": 7}\n'
        '{"context": "a", "question": "b", "answer": "c"}\n'
    )
    assert list(load_file(path)["max_new_tokens"]) == [7, 50]


def test_a_plain_text_is_one_answer(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("context,question,answer\na,b,42\n")
    table = load_file(path)
    assert list(table["answer"]) == [["42"]]
    assert list(table["max_new_tokens"]) == [50]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "context,question\na,b\n", "no column 'answer'"),
        ("t.csv", "", "cannot be read"),
        ("t.jsonl", "", "no column 'context'"),
        ("t.jsonl", "{broken", "cannot be read"),
        ("t.csv", "context,question,answer\n", "has no rows"),
        ("t.csv", "context,question,answer\n,b,c\n", "row 0: the context is empty"),
        ("t.csv", "context,question,answer\na,b,\n", "row 0: the answer is empty"),
        ("t.csv", "context,question,answer,max_new_tokens\na,b,c,x\n", "max_new_tokens is 'x'"),
        ("t.parquet", "no parquet", "cannot be read"),
    ],
)
def test_what_cannot_be_a_data_set_is_one_clear_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(cp.CachepressError, match=message) as caught:
        load_file(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(cp.CachepressError, match="does not exist"):
        load_file(tmp_path / "no.csv")
