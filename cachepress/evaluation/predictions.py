"""Writes and reads predictions.csv so that every text comes back exactly as it was.

Every field is quoted, so that line ends, quotes and spaces are part of it, and a text is never
taken for a number or for nothing. Two kinds of character cannot stand in a CSV file in UTF-8: NUL,
and a surrogate without its partner. In their place stands U+241B, the symbol for escape, with the
four hexadecimal digits of the character, and so it does in the place of U+241B itself.
"""

import csv
import re
from pathlib import Path

import pandas as pd

from cachepress.evaluation.delimited import read_delimited
from cachepress.evaluation.records import write_atomically

PREDICTIONS = "predictions.csv"
OWN_METRIC = "own_metric"
"""Column of the metric that a sample brings with it, on disk only where another has judged."""
ESCAPE = "\u241b"
_UNSAFE = re.compile(f"[\0\ud800-\udfff{ESCAPE}]")
_ESCAPED = re.compile(f"{ESCAPE}(0000|d[89a-f][0-9a-f]{{2}}|{ord(ESCAPE):04x})")


def escape(text: str) -> str:
    """Escape the characters of a text that a CSV file in UTF-8 cannot hold."""
    return _UNSAFE.sub(lambda found: f"{ESCAPE}{ord(found[0]):04x}", text)


def unescape(text: str) -> str:
    """Undo ``escape``."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)


def write_predictions(path: Path, table: pd.DataFrame) -> None:
    """Write a table of predictions, without its index."""
    if list(table[OWN_METRIC]) == list(table["metric"]):
        table = table.drop(columns=OWN_METRIC)
    safe = table.map(lambda value: escape(value) if isinstance(value, str) else value)
    text = safe.to_csv(index=False, quoting=csv.QUOTE_ALL, lineterminator="\n")
    write_atomically(path, text)


def read_predictions(path: Path) -> pd.DataFrame:
    """Read a table of predictions, also of version 0.1.0; all columns are texts.

    Raises:
        ValueError: if it is damaged.
    """
    text = path.read_bytes().decode("utf-8-sig")
    read = read_delimited(text)
    rows = read.rows
    if text.startswith('"'):  # 0.1.0 escaped nothing, and left the header without quotes.
        rows = [[unescape(field) for field in row] for row in rows]
    table = pd.DataFrame(rows, columns=read.header, dtype=object)
    if OWN_METRIC not in table and "metric" in table:
        table[OWN_METRIC] = table["metric"]
    return table
