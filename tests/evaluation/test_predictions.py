"""predictions.csv is data: whatever was predicted comes back from it, character by character."""

import csv
import io
import math

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachepress.evaluation.predictions import (
    escape,
    read_predictions,
    unescape,
    write_predictions,
)

ANY_CHARACTER = st.characters(categories=None, exclude_categories=())
ODD = st.sampled_from(list("\0\r\n\t\"',=+-@ \ufeff\u2028\ud800\udfff\u241b0d8"))
TEXTS = st.text(st.one_of(ANY_CHARACTER, ODD), max_size=12)
AWKWARD = [
    *("", " ", "\r", "\n", "\r\n", "a\rb", '"', '""', ",", "NA", "null", "None", "nan", "00123"),
    *("=1+1", "@x", " both ", "\ufeff", "\u2028", "\0", "\ud800", "\ud83d\ude00", "\u241b"),
    *(
        "\u241b0000",
        "\u241bd800",
        "\u241b241b",
        "\u241b\0",
        "\\0",
        "1e999",
        "#",
        "'",
        "\x1a",
        "\x85",
    ),
]


def table_of(texts, metric="string_match", own=None):
    own = metric if own is None else own
    return pd.DataFrame(
        {"sample_id": range(len(texts)), "predicted_answer": texts, "metric": metric},
        dtype=object,
    ).assign(own_metric=own, score=0.5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("predictions") / "predictions.csv"


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
@example(AWKWARD)
def test_any_text_comes_back_exactly(path, texts):
    write_predictions(path, table_of(texts))
    read = read_predictions(path)
    assert list(read["predicted_answer"]) == texts
    assert list(read["score"]) == ["0.5"] * len(texts)
    # A library that knows nothing of us reads the same, but for what is escaped.
    plain = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert [unescape(text) for text in plain["predicted_answer"]] == texts
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))
    assert [unescape(row["predicted_answer"]) for row in rows] == texts


@settings(max_examples=150, deadline=None)
@given(TEXTS)
@example("\u241b0000")
@example("\ud83d\ude00")
def test_the_escape_is_reversible_and_touches_nothing_else(text):
    safe = escape(text)
    assert unescape(safe) == text
    safe.encode("utf-8")
    assert "\0" not in safe
    assert (safe == text) == (not any(c in "\0\u241b" or "\ud800" <= c <= "\udfff" for c in text))


def test_the_escape_is_the_one_that_is_documented():
    assert escape("a\0b\ud800c\u241bd") == "a\u241b0000b\u241bd800c\u241b241bd"


def test_every_field_is_quoted_and_nothing_is_empty(path):
    table = table_of(["x"]).assign(length=None, kl=math.nan)
    write_predictions(path, table)
    assert path.read_text() == (
        '"sample_id","predicted_answer","metric","score","length","kl"\n'
        '"0","x","string_match","0.5","",""\n'
    )


def test_the_own_metric_stands_there_where_another_has_judged(path):
    write_predictions(path, table_of(["x"], "qa_f1", "string_match"))
    read = read_predictions(path)
    assert (list(read["metric"]), list(read["own_metric"])) == (["qa_f1"], ["string_match"])
    write_predictions(path, read.assign(metric=read["own_metric"]))
    assert "own_metric" not in path.read_text().splitlines()[0]
    assert list(read_predictions(path)["own_metric"]) == ["string_match"]


def test_a_table_of_0_1_0_is_read_as_it_is(path):
    texts = ["\u241b0000", 'a\n"b", c', "NA", " x ", "", "00123"]
    old = table_of(texts).drop(columns="own_metric")
    old.to_csv(path, index=False, lineterminator="\n")
    read = read_predictions(path)
    assert list(read["predicted_answer"]) == texts
    assert list(read["own_metric"]) == ["string_match"] * 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ('"a","b"\n"1"\n', "line 2, row 0: got 1 fields, wanted 2"),
        ('"a"\n"1","2"\n', "line 2, row 0: got 2 fields, wanted 1"),
        ('"a"\n"1', "unexpected end of data"),
    ],
)
def test_a_damaged_table_is_told(path, text, message):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_predictions(path)
