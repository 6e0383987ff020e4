"""Loads a local table as a data set.

A text stays the text that it is: nothing in a CSV file is taken for a number, and only what the
file declares as a list is one, which is an array in JSON, a column of lists in Parquet, and in CSV
a cell of the columns ``LISTS``, written as an array in JSON.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.delimited import read_delimited, repeated
from cachepress.evaluation.tasks.base import (
    BEYOND,
    COLUMNS,
    DEFAULT_LIMIT,
    REQUIRED,
    UNSCORED,
    normalise,
    whole_number,
)
from cachepress.evaluation.tasks.converted import LAYOUT_COLUMNS, Row, as_official
from cachepress.limits import said, shown

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)
SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
ALIASES = {"answers": "answer", "all_classes": "choices"}
"""Other names of columns."""
LISTS = ("answers", "choices", "all_classes")
"""Columns whose cells are arrays of texts in a CSV file too."""
SHOWN = 60
LONGEST_WHOLE = 4000
"""Digits of a number that Python reads and writes without being asked twice."""
MOST_NAMES = 20


@dataclass(frozen=True)
class _Raw:
    """Rows and columns of a file, before they are checked.

    Attributes:
        columns: the cells of each column, as the file's own type has them.
        places: where each row is.
    """

    columns: Mapping[str, list[object]]
    places: list[str]


class _Spelt(float):
    """Number that keeps its spelling in the file, such as "1e3", "2.50" or "-0"."""

    spelling: str

    def __new__(cls, spelling: str) -> "_Spelt":
        """Read a number, and keep its spelling."""
        made = super().__new__(cls, spelling)
        made.spelling = spelling
        return made


def load_file(path: Path) -> pd.DataFrame:
    """Read a .csv, .jsonl, .json or .parquet file with the columns of a data set.

    Needed are "context", "question" and "answer", or "answers" for lists of texts; the other
    columns have defaults. Rows of a benchmark's task have its official metric.

    Raises:
        CachepressError: if the file is missing, empty or unreadable, or lacks a column, or a cell
            is not what its column wants; the line says which row and column.
    """
    origin = f"data file {path}"
    if not path.is_file():
        reason = "is a folder, wanted a file in it" if path.is_dir() else "does not exist"
        raise CachepressError(f"{origin} {reason}")
    try:
        raw = _read(path)
    except (ValueError, OSError, NotImplementedError) as error:
        raise CachepressError(f"{origin} cannot be read: {said(error)}") from error
    names = _names(raw, origin)
    if not raw.places:
        raise CachepressError(f"{origin} has no rows")
    rows = as_official([_row(raw, names, i, origin) for i in range(len(raw.places))], path)
    for place, row in zip(raw.places, rows, strict=False):
        if not row["answer"] and row["metric"] != UNSCORED:
            raise CachepressError(f"{origin}, {place}: the answer is empty, wanted a text")
    if path.suffix == ".csv" and "answer" in names:
        _warn_of_lists(rows, origin)
    for row in rows:  # Of lengths, only numbers can be told apart on a page.
        row |= {name: None for name in ("length", "depth") if isinstance(row[name], str)}
    return normalise(pd.DataFrame(rows, dtype=object), task=path.stem, origin=origin)


def _read(path: Path) -> _Raw:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".csv":
        return _read_csv(text)
    return _read_json_lines(text) if path.suffix == ".jsonl" else _read_json(text)


def _read_csv(text: str) -> _Raw:
    table = read_delimited(text)
    named = [(i, name) for i, name in enumerate(table.header) if name]
    cells: dict[str, list[object]] = {name: [row[i] for row in table.rows] for i, name in named}
    for name in LISTS:
        if name in cells:
            cells[name] = [_array(str(cell), name, i) for i, cell in enumerate(cells[name])]
    places = [f"line {line}, row {i}" for i, line in enumerate(table.lines)]
    return _Raw(cells, places)


def _array(cell: str, name: str, row: int) -> object:
    """Parse a CSV cell that holds an array; None for an empty cell."""
    if not cell.strip():
        return None
    try:
        value = _parse(cell)
    except ValueError:
        value = None
    if not isinstance(value, list):
        raise ValueError(
            f"row {row}: the {name} is {_shown(cell)}, wanted an array in JSON such as "
            '["one", "two"], as that column holds lists'
        )
    return value


def _read_json_lines(text: str) -> _Raw:
    rows, places = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_parse(line))
        except ValueError as error:
            raise ValueError(f"line {number}, row {len(rows)}: {error}") from error
        places.append(f"line {number}, row {len(places)}")
    return _columns(rows, places)


def _read_json(text: str) -> _Raw:
    value = _parse(text)
    if isinstance(value, dict) and value:
        columns = [cells if isinstance(cells, dict) else None for cells in value.values()]
        if any(cells is None or [*cells] != [*(columns[0] or {})] for cells in columns):
            raise ValueError("wanted an array of rows, or an object of columns with the same rows")
        cells = {name: [*column.values()] for name, column in value.items()}
        return _Raw(cells, [f"row {i}" for i in range(len(columns[0] or {}))])
    if not isinstance(value, list):
        raise ValueError("wanted an array of rows, or an object of columns with the same rows")
    return _columns(value, [f"row {i}" for i in range(len(value))])


def _columns(rows: list, places: list[str]) -> _Raw:
    for place, row in zip(places, rows, strict=True):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: got {_shown(row)}, wanted an object of columns")
    names = dict.fromkeys(name for row in rows for name in row)
    return _Raw({name: [row.get(name) for row in rows] for name in names}, places)


def _parse(text: str) -> object:
    try:
        return json.loads(text, parse_float=_Spelt, parse_int=_whole, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _whole(spelling: str) -> int | _Spelt:
    plain = spelling != "-0" and len(spelling) <= LONGEST_WHOLE
    return int(spelling) if plain else _Spelt(spelling)


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{repeated(name for name, _ in pairs)!r} is there twice")
    return found


def _read_parquet(path: Path) -> _Raw:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if (twice := repeated(names)) is not None:
            raise ValueError(f"the column {twice!r} is there twice")
        known = [n for n in (*COLUMNS, *ALIASES, *LAYOUT_COLUMNS) if n in names]
        table = file.read(columns=known)
        columns = {name: _cells(table[name], name) for name in known}
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(str(error)) from error
    places = [f"row {i}" for i in range(file.metadata.num_rows)]
    return _Raw({name: columns.get(name, []) for name in names}, places)


def _cells(column: "pa.ChunkedArray", name: str) -> list[object]:
    cells = []
    for row, cell in enumerate(column):
        try:
            cells.append(cell.as_py())
        except UnicodeDecodeError as error:
            raise ValueError(f"row {row}: the {name} is not UTF-8: {error}") from error
        except (ValueError, OverflowError) as error:  # Dates may be beyond those of Python.
            kind = str(cell.type)[:SHOWN]
            raise ValueError(f"row {row}: the {name} is a {kind}, not a text") from error
    return cells


def _names(raw: _Raw, origin: str) -> dict[str, str]:
    """Map each column of a data set to its name in the file."""
    found = {name: name for name in (*COLUMNS, *LAYOUT_COLUMNS) if name in raw.columns}
    for alias, name in ALIASES.items():
        if alias in raw.columns and name in found:
            raise CachepressError(
                f"{origin} has the columns {alias!r} and {name!r}, which mean the same: leave one "
                "out"
            )
        if alias in raw.columns:
            found[name] = alias
    for name in REQUIRED:
        if name not in found:
            raise CachepressError(
                f"{origin} has no column {name!r}: it has {_listed(list(raw.columns))}, wanted "
                f"{', '.join(REQUIRED)}"
            )
    return found


def _listed(names: list[str]) -> str:
    """List names of columns for an error message, cut if there are many."""
    shown = [name if name.isprintable() else _shown(name) for name in names[:MOST_NAMES]]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(name[:SHOWN] for name in shown) + more if names else "none"


def _row(raw: _Raw, names: Mapping[str, str], number: int, origin: str) -> Row:
    """Check a row, and convert it to the columns of a data set."""
    row: Row = {}
    for name in (*COLUMNS, *LAYOUT_COLUMNS):
        if name in LAYOUT_COLUMNS and name not in names:
            continue
        cell = raw.columns[names[name]][number] if name in names else None
        try:
            row[name] = _checked(name, None if _is_nothing(cell) else cell)
        except ValueError as error:
            where = f"{origin}, {raw.places[number]}: the {names.get(name, name)}"
            raise CachepressError(f"{where} {error}") from error
    return row


def _is_nothing(cell: object) -> bool:
    return cell is None or (isinstance(cell, float) and cell != cell)


def _checked(name: str, cell: object) -> object:
    """Check a cell, and convert it to the type of its column.

    Raises:
        ValueError: if it is something else, saying what it is.
    """
    if name == "context":
        return _filled("" if cell is None else _text(cell))
    if name in ("question", "answer_prefix", "separator"):
        return "" if cell is None else _text(cell)
    if name in ("answer", "choices"):
        return _texts(cell)
    if name == "max_new_tokens":
        return _limit(cell)
    if name in ("length", "depth"):
        return _number(cell)
    if cell is None or cell == "":
        return None
    told = name in LAYOUT_COLUMNS or (name == "chat" and isinstance(cell, bool))
    return cell if told else _text(cell, numbers=True)


def _text(cell: object, numbers: bool = False) -> str:
    """Check that a cell is a text; with ``numbers``, a number too, as the file spells it."""
    if isinstance(cell, str):
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"holds half of a surrogate pair: {_shown(cell)}") from error
        return cell
    if numbers and isinstance(cell, _Spelt):
        return cell.spelling
    if numbers and isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    raise ValueError(f"is {_kind(cell)}, not a text")


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty, wanted a text")
    return text


def _texts(cell: object) -> list[str]:
    """Convert a cell to a list of texts: one text, a list of them, or nothing."""
    if cell is None or cell == "":
        return []
    if not isinstance(cell, list):
        return [_filled(_text(cell, numbers=True))]
    found = []
    for place, item in enumerate(cell):
        try:
            found.append(_filled(_text(item, numbers=True)))
        except ValueError as error:
            raise ValueError(f"is a list whose item {place} {error}") from error
    return found


def _limit(cell: object) -> int:
    """Check a number of tokens; an empty cell gives the default."""
    if cell is None or cell == "":
        return DEFAULT_LIMIT
    digits = str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
    tokens = whole_number(digits) if digits.isascii() and digits.isdecimal() else 0
    if not 1 <= tokens < BEYOND:
        raise ValueError(f"is {_shown(cell)}, wanted a whole number above 0")
    return tokens


def _number(cell: object) -> int | float | str | None:
    """Convert the length or depth of a row to a number, or leave a text as it is.

    None where nothing is said, or a number that no length is.
    """
    if cell is None or cell == "":
        return None
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        raise ValueError(f"is {_kind(cell)}, not a number")
    try:
        number = float(cell)
    except ValueError:
        return cell
    except OverflowError:
        return None
    if not abs(number) < BEYOND:
        return None
    return int(number) if number.is_integer() and not isinstance(cell, float) else number


def _kind(cell: object) -> str:
    """Describe the type of a cell and its beginning, for error messages."""
    if cell is None:
        return "null"
    kinds = {bool: "a truth value,", int: "the number", float: "the number"}
    named = next((words for kind, words in kinds.items() if isinstance(cell, kind)), None)
    return f"{named or f'a {type(cell).__name__},'} {_shown(cell)}"


def _shown(cell: object) -> str:
    """Return the beginning of a cell's ``repr``."""
    if not isinstance(cell, _Spelt):
        return shown(cell, SHOWN)
    spelling = cell.spelling
    return spelling if len(spelling) <= SHOWN else f"{spelling[: SHOWN - 1]}\u2026"


def _warn_of_lists(rows: list[Row], origin: str) -> None:
    """Warn if all texts of a column look like lists."""
    lists = [row["answer"] for row in rows]
    texts = [text for answers in lists if isinstance(answers, list) for text in answers]
    if texts and all(_is_array(text) for text in texts):
        logger.warning(
            "%s: every answer looks like a list, and is one text: name the column 'answers' if "
            "they are lists",
            origin,
        )


def _is_array(text: str) -> bool:
    try:
        return text.startswith("[") and isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False
