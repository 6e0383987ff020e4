"""Tables for spreadsheets: texts are no formulas, numbers are numbers."""

import csv
import math

import pytest

from cachepress.evaluation.statistics import Estimate
from cachepress.evaluation.tables import ESTIMATE, Column, sheet_line, spreadsheet


def read(text: str) -> list[dict[str, object]]:
    """What a reader makes of it that takes what is quoted for a text, and the rest for numbers."""
    head, *rows = csv.reader(text.splitlines(keepends=True), quoting=csv.QUOTE_NONNUMERIC)
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", '=HYPERLINK("http://a,b","c")'],
)
def test_a_text_that_would_be_computed_begins_with_an_apostrophe(text):
    assert read(spreadsheet([{"a": text, text: "b"}])) == [{"a": f"'{text}", f"'{text}": "b"}]


@pytest.mark.parametrize("text", ["", "a=1", "'=1", " =1", "1", "é\u2028\u05e9", 'a "b", c\nd'])
def test_another_text_stays_as_it_is(text):
    assert read(spreadsheet([{"a": text}])) == [{"a": text}]


def test_numbers_are_numbers_in_full_and_what_is_unknown_is_empty():
    row = {"a": -0.1234567890123, "b": -3, "c": 2**53, "d": None, "e": float("nan")}
    text = spreadsheet([row, {"f": float("-inf"), "a": 1e-300}])
    assert text == (
        '"a","b","c","d","e","f"\n-0.1234567890123,-3,9007199254740992,"","",""\n'
        '1e-300,"","","","",""\n'
    )


def test_an_estimate_has_three_columns():
    column = Column("x", lambda found: found, kind=ESTIMATE)
    line = sheet_line([column], Estimate(-0.5, math.nan, math.inf, 3, 2))
    assert read(spreadsheet([line])) == [{"x": -0.5, "x low": "", "x high": ""}]
    assert sheet_line([column], None) == {"x": None, "x low": None, "x high": None}
