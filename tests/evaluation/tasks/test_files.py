"""Local files: a text stays that text, and a list is one where the file says so."""

import csv
import datetime
import json
from decimal import Decimal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cachepress as cp
from cachepress.evaluation.registry import METRIC_REGISTRY
from cachepress.evaluation.tasks.base import COLUMNS
from cachepress.evaluation.tasks.files import load_file

ROWS = [
    {"context": "a", "question": "b", "answer": ["c", "d"], "max_new_tokens": 7},
    {"context": "a", "question": "", "answer": ["e"], "max_new_tokens": 8},
]


def save(path, rows):
    if path.suffix == ".csv":
        table = pd.DataFrame(rows).rename(columns={"answer": "answers"})
        table.assign(answers=[json.dumps(r["answer"]) for r in rows]).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def one(path, answer, context="c", **columns):
    """A file with one row, whose answer is given as the file's own type."""
    row = {"context": context, "question": "q", "answer": answer, **columns}
    if path.suffix == ".parquet":
        pq.write_table(
            pa.table({k: v if isinstance(v, pa.Array) else pa.array([v]) for k, v in row.items()}),
            path,
        )
    else:
        path.write_text(json.dumps(row) + "\n")
    return path


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


def test_a_table_of_columns_in_json_is_read_too(tmp_path):
    path = tmp_path / "t.json"
    pd.DataFrame(ROWS).to_json(path)
    assert list(load_file(path)["answer"]) == [["c", "d"], ["e"]]


def test_an_empty_limit_is_the_default(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("context,question,answer,max_new_tokens\na,b,c,7\na,b,c,\n")
    assert list(load_file(path)["max_new_tokens"]) == [7, 50]
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"context": "a", "question": "b", "answer": "c", "max_new_tokens": 7.0}\n'
        '{"context": "a", "question": "b", "answer": "c"}\n'
        '{"context": "a", "question": "b", "answer": "c", "max_new_tokens": NaN}\n'
    )
    assert list(load_file(path)["max_new_tokens"]) == [7, 50, 50]


def test_a_null_question_or_beginning_is_empty(tmp_path):
    path = one(tmp_path / "t.jsonl", "a", question=None, answer_prefix=None, task=None, metric=None)
    row = load_file(path).iloc[0]
    assert (row["question"], row["answer_prefix"], row["task"]) == ("", "", "t")
    assert row["metric"] == "string_match"


ODD = ["00123", "2.50", "1e5", "-0", "0x1F", "inf", "nan", "NA", "null", "True", "2024-01-02"]
ODD += [
    "[2, 5]",
    '["a"]',
    "[1]",
    "=1+1",
    " x ",
    "a\nb",
    "a\rb",
    'say "x"',
    "a,b",
    "x\u2028y",
    "\ufeffx",
]


@pytest.mark.parametrize("text", ODD)
def test_a_text_in_csv_stays_that_text(tmp_path, text):
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["context", "question", "answer"], ["c", text, text]])
    row = load_file(path).iloc[0]
    assert (row["question"], row["answer"]) == (text, [text])
    assert load_file(one(tmp_path / "t.jsonl", text))["answer"][0] == [text]
    assert load_file(one(tmp_path / "t.parquet", text))["answer"][0] == [text]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=4))
def test_any_texts_come_out_of_every_format_as_they_are(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("any")
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([["context", "question", "answer"], *([t, t, t] for t in texts)])
    rows = [{"context": t, "question": t, "answer": t} for t in texts]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        table = load_file(folder / name)
        assert list(table["context"]) == list(table["question"]) == texts
        assert list(table["answer"]) == [[t] for t in texts]


def test_predictions_of_texts_that_look_like_others_are_scored_as_texts(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("context,question,answer\nc,q,00123\nc,q,2.50\n")
    match = METRIC_REGISTRY["string_match"]
    codes = load_file(path)["answer"]
    assert (match("It is 00123.", codes[0]), match("It is 123.", codes[0])) == (1, 0)
    assert match("2.5", codes[1]) == 0
    interval = load_file(one(tmp_path / "t.jsonl", "[2, 5]"))["answer"][0]
    assert (match("It is 25.", interval), match("x in [2, 5]", interval)) == (0, 1)


def test_a_number_in_json_is_the_text_that_spells_it(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = ["2.50", "7", "1E5", '["x", 3, 1.0]', "-0", "-0.0", "1e400", "9" * 5000]
    path.write_text("".join(f'{{"context":"c","question":"q","answer":{x}}}\n' for x in rows))
    texts = [[x] for x in rows]
    texts[3] = ["x", "3", "1.0"]
    assert list(load_file(path)["answer"]) == texts


def test_lists_in_csv_are_declared_by_their_column(tmp_path, caplog):
    path = tmp_path / "t.csv"
    path.write_text(
        'context,question,answers,choices\nc,q,"[""a"", ""b, c""]","[""x""]"\nc,q,"[""d""]",\n'
    )
    table = load_file(path)
    assert list(table["answer"]) == [["a", "b, c"], ["d"]]
    assert list(table["choices"]) == [["x"], []]
    assert not caplog.records
    path.write_text('context,question,answer\nc,q,"[""a""]"\n')
    assert list(load_file(path)["answer"]) == [['["a"]']]
    assert "every answer looks like a list, and is one text" in caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        pa.array([["a", "b"]], pa.list_(pa.string())),
        pa.array([["a", "b"]], pa.list_(pa.large_string())),
        pa.array([["a", "b"]], pa.large_list(pa.string())),
        pa.array([["a", "b"]], pa.list_(pa.string(), 2)),
        pa.array([["a", "b"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    ],
    ids=str,
)
def test_every_kind_of_list_in_parquet_is_a_list(tmp_path, answer):
    assert load_file(one(tmp_path / "t.parquet", answer))["answer"][0] == ["a", "b"]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())],
    ids=str,
)
def test_every_kind_of_text_in_parquet_is_a_text(tmp_path, kind):
    answer = pa.array(["[1]"], pa.string()).cast(kind)
    assert load_file(one(tmp_path / "t.parquet", answer, task=answer))["answer"][0] == ["[1]"]


def test_whole_numbers_in_parquet_are_texts_and_folder_names_are_no_columns(tmp_path):
    folder = tmp_path / "answer=9"
    folder.mkdir()
    assert load_file(one(folder / "t.parquet", 7))["answer"][0] == ["7"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "row 0: the answer is empty"),
        ("", "row 0: the answer is empty"),
        (" \n", "row 0: the answer is empty"),
        ([], "row 0: the answer is empty"),
        ([""], "row 0: the answer is a list whose item 0 is empty"),
        (["a", " "], "row 0: the answer is a list whose item 1 is empty"),
        (["a", None], "row 0: the answer is a list whose item 1 is null, not a text"),
        ([["a"]], "row 0: the answer is a list whose item 0 is a list, ['a'], not a text"),
        ({"a": "b"}, "row 0: the answer is a dict, {'a': 'b'}, not a text"),
        ([{"a": "b"}], "whose item 0 is a dict, {'a': 'b'}, not a text"),
        (True, "row 0: the answer is a truth value, True, not a text"),
        ([False], "whose item 0 is a truth value, False, not a text"),
    ],
)
@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_an_answer_that_is_no_text_is_refused_with_its_row(tmp_path, name, answer, message):
    with pytest.raises(cp.CachepressError) as caught:
        load_file(one(tmp_path / name, answer))
    assert message in str(caught.value)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [2.5, float("nan"), datetime.date(2024, 1, 2), b"x", Decimal("2.50"), [2.5], [b"x"]],
    ids=repr,
)
def test_what_parquet_has_no_text_for_is_refused(tmp_path, answer):
    with pytest.raises(cp.CachepressError, match="row 0: the answer is .*(not a text|empty)"):
        load_file(one(tmp_path / "t.parquet", answer))


@pytest.mark.parametrize("name", ["answer", "length", "metric"])
@pytest.mark.parametrize(
    "far",
    [
        pa.array([2**50], pa.timestamp("s")),
        pa.array([2**62], pa.timestamp("us")),
        pa.array([2**30], pa.int32()).cast(pa.date32()),
        pa.array([2**60], pa.duration("s")),
    ],
    ids=lambda array: str(array.type),
)
def test_dates_beyond_those_of_python_are_refused_with_their_row(tmp_path, name, far):
    path = one(tmp_path / "t.parquet", **{"answer": "a", name: far})
    with pytest.raises(cp.CachepressError, match=f"row 0: the {name} is a .*, not a "):
        load_file(path)


def test_a_cell_that_is_nested_deeply_is_refused_in_one_short_line(tmp_path):
    path = tmp_path / "t.jsonl"
    for depth in (50, 900, 5000, 200_000):
        path.write_text(f'{{"context":"c","question":"q","answer":{"[" * depth}{"]" * depth}}}')
        with pytest.raises(cp.CachepressError, match="line 1, row 0: ") as caught:
            load_file(path)
        assert len(str(caught.value)) < 300 + len(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"context": 5}, "row 0: the context is the number 5, not a text"),
        ({"context": 2.50}, "row 0: the context is the number 2.5, not a text"),
        ({"context": True}, "row 0: the context is a truth value, True, not a text"),
        ({"context": None}, "row 0: the context is empty, wanted a text"),
        ({"context": ["a"]}, "row 0: the context is a list, ['a'], not a text"),
        ({"question": 5}, "row 0: the question is the number 5, not a text"),
        ({"answer_prefix": ["a"]}, "row 0: the answer_prefix is a list, ['a'], not a text"),
        ({"max_new_tokens": "x"}, "row 0: the max_new_tokens is 'x', wanted a whole number above"),
        ({"max_new_tokens": 2.5}, "the max_new_tokens is 2.5,"),
        ({"max_new_tokens": 0}, "the max_new_tokens is 0,"),
        ({"max_new_tokens": -3}, "the max_new_tokens is -3,"),
        ({"max_new_tokens": True}, "the max_new_tokens is True,"),
        ({"max_new_tokens": "\u00b2"}, "the max_new_tokens is '\u00b2',"),
        ({"max_new_tokens": "9" * 5000}, "the max_new_tokens is '9999"),
        ({"max_new_tokens": 10**30}, "the max_new_tokens is 1000"),
        ({"max_new_tokens": [5]}, "the max_new_tokens is [5],"),
        ({"metric": ["a"]}, "row 0: the metric is a list, ['a'], not a text"),
        ({"task": {"a": 1}}, "row 0: the task is a dict, {'a': 1}, not a text"),
        ({"length": [1]}, "row 0: the length is a list, [1], not a number"),
        ({"context": "a\ud800"}, "the context holds half of a surrogate pair"),
        ({"all_classes": [1, None]}, "the all_classes is a list whose item 1 is null"),
    ],
)
def test_a_cell_of_another_kind_is_refused_with_row_and_column(tmp_path, columns, message):
    good = one(tmp_path / "good.jsonl", "a").read_text()
    path = one(tmp_path / "t.jsonl", "a", **columns)
    path.write_text(good + path.read_text())
    with pytest.raises(cp.CachepressError) as caught:
        load_file(path)
    assert message.replace("row 0", "line 2, row 1") in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name_of",
    [
        "row,{rows}",
        "{rows},checked by Ann",
        "{rows},",
    ],
)
def test_a_row_with_a_field_more_than_the_header_is_refused(tmp_path, name_of):
    path = tmp_path / "t.csv"
    path.write_text("context,question,answer\n" + f"{name_of}\n".format(rows="c,q,a") * 3)
    with pytest.raises(cp.CachepressError, match=r"line 2, row 0: got 4 fields, wanted 3 as the"):
        load_file(path)


def test_lines_count_line_ends_in_quotes_and_rows_do_not(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('context,question,answer\n"a\nb\r\nc",q,x\n\nc,q\n', newline="")
    with pytest.raises(cp.CachepressError, match="line 6, row 1: got 2 fields, wanted 3.*'answer'"):
        load_file(path)


def test_a_column_of_row_numbers_without_a_name_is_left_out(tmp_path):
    path = tmp_path / "t.csv"
    pd.DataFrame([{"context": "c", "question": "q", "answer": "007"}]).to_csv(path)
    assert list(load_file(path)["answer"]) == [["007"]]


@pytest.mark.parametrize("row", ["c,q,Denver, Colorado,", "c,q,a,,b", "c,q,a, ,"])
def test_a_field_below_no_name_is_refused(tmp_path, row):
    path = tmp_path / "t.csv"
    path.write_text(f"context,question,answer,,\nc,q,a,,\n{row}\n")
    with pytest.raises(cp.CachepressError, match="line 3, row 1: '.*' stands below no name: name"):
        load_file(path)


def test_columns_of_nothing_are_left_out(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(",context,question,answer,,\n7,c,q,a,,\n,c,q,b,,\n")
    assert list(load_file(path)["answer"]) == [["a"], ["b"]]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_mark_of_byte_order_is_no_part_of_the_first_name(tmp_path, name):
    path = tmp_path / name
    texts = {"t.csv": "context,question,answer\nc,q,a\n", "t.jsonl": json.dumps(ROWS[0]) + "\n"}
    path.write_text(texts[name], encoding="utf-8-sig")
    assert load_file(path)["answer"][0][0] in "ac"


@pytest.mark.parametrize(
    ("spelt", "number"),
    [
        ('"4096"', 4096),
        ("0.5", 0.5),
        ('"0.25"', 0.25),
        ("-0", 0),
        ('"nan"', None),
        ('"inf"', None),
        ("1e400", None),
        ("1" + "0" * 400, None),
        (f'"{"9" * 5000}"', None),
        ('"8k"', None),
        ("null", None),
    ],
)
def test_what_no_length_is_is_none(tmp_path, spelt, number):
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"context":"c","question":"q","answer":"a","length":{spelt}}}')
    assert list(load_file(path)["length"]) == [number]


def test_lengths_and_depths_are_numbers(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("context,question,answer,length,depth\nc,q,a,4096,0.5\nc,q,a,short,\n")
    table = load_file(path)
    assert list(table["length"]) == [4096, None]
    assert list(table["depth"]) == [0.5, None]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "context,question\na,b\n", "no column 'answer'"),
        ("t.csv", "", "cannot be read: it is empty"),
        ("t.csv", "\n\n", "cannot be read: it is empty"),
        ("t.jsonl", "", "no column 'context'"),
        ("t.json", "[]", "no column 'context'"),
        ("t.json", "", "cannot be read"),
        ("t.json", "5", "wanted an array of rows"),
        ("t.json", '{"context": "a"}', "wanted an array of rows"),
        ("t.json", '{"context": {"0": "a"}, "question": {"1": "a"}}', "with the same rows"),
        ("t.json", "{}", "wanted an array of rows"),
        ("t.json", "[" * 100_000, "cannot be read"),
        ("t.jsonl", "{broken", "cannot be read: line 1, row 0"),
        ("t.jsonl", "[1]\n", r"line 1, row 0: got \[1\], wanted an object of columns"),
        ("t.jsonl", '{"answer": 1, "answer": 2}', "'answer' is there twice"),
        ("t.csv", "context,question,answer\n", "has no rows"),
        ("t.csv", "context,question,answer\n,b,c\n", "line 2, row 0: the context is empty"),
        ("t.csv", "context,question,answer\na,b,\n", "line 2, row 0: the answer is empty"),
        ("t.csv", "context,question,answer,max_new_tokens\na,b,c,x\n", "max_new_tokens is 'x'"),
        ("t.csv", "context,question,answer,answer\na,b,c,d\n", "'answer' is there twice"),
        (
            "t.csv",
            "context,question,answer,answers\na,b,c,d\n",
            "row 0: the answers is 'd', wanted",
        ),
        ("t.csv", 'context,question,answer,answers\na,b,c,"[""d""]"\n', "mean the same"),
        ("t.csv", "context,question,answers\na,b,['c']\n", r"wanted an array in JSON such as"),
        ("t.csv", 'context,question,answer\na,b,"c\n', "line 2, row 0: unexpected end of data"),
        ("t.csv", 'context,question,answer\na,b,"c"d\n', "line 2, row 0: "),
        ("t.parquet", "no parquet", "cannot be read"),
        ("t.parquet", "", "cannot be read"),
    ],
)
def test_what_cannot_be_a_data_set_is_one_clear_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(cp.CachepressError, match=message) as caught:
        load_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json"])
def test_bytes_that_are_no_utf_8_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes("context,question,answer\ncaf\u00e9,q,a\n".encode("latin-1"))
    with pytest.raises(cp.CachepressError, match="cannot be read: 'utf-8' codec"):
        load_file(path)


def test_a_text_in_parquet_that_is_no_utf_8_is_refused_with_its_row(tmp_path):
    path = tmp_path / "t.parquet"
    texts = pa.array([b"good", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"context": texts, "question": texts, "answer": texts}), path)
    with pytest.raises(cp.CachepressError, match="row 1: the context is not UTF-8"):
        load_file(path)


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path):
    path = tmp_path / "t.parquet"
    cell = pa.array(["a"])
    names = ["context", "question", "answer", "answer"]
    pq.write_table(pa.table([cell] * 4, names=names), path)
    with pytest.raises(cp.CachepressError, match="'answer' is there twice"):
        load_file(path)


def test_names_of_columns_that_are_many_or_odd_stay_one_short_line(tmp_path):
    path = tmp_path / "t.csv"
    names = ",".join(f"c{i}" + "x" * 500 for i in range(3000))
    path.write_text(f'"a\nb\x1b[2J",{names}\n{"," * 3000}\n')
    with pytest.raises(
        cp.CachepressError, match=r"it has 'a\\nb\\x1b.*and 2981 more, wanted"
    ) as found:
        load_file(path)
    assert len(str(found.value)) < 1600 + len(str(path)) and "\n" not in str(found.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(cp.CachepressError, match="does not exist"):
        load_file(tmp_path / "no.csv")


def test_a_folder_is_called_one(tmp_path):
    (tmp_path / "t.parquet").mkdir()
    with pytest.raises(cp.CachepressError, match=r"t\.parquet is a folder, wanted a file in it"):
        load_file(tmp_path / "t.parquet")
