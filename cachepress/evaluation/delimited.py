"""Reads CSV as rows of texts, without type inference, and refuses rows of a wrong width."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass

LONGEST_FIELD = 1 << 30
_REMEDY = "name every column, and put what holds the delimiter into quotes"


@dataclass(frozen=True)
class Delimited:
    """Table of texts that was read from a CSV file.

    Attributes:
        header: names of the columns.
        rows: the texts of each row, as many as there are columns.
        lines: the line of the file on which each row begins.
    """

    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def records(self) -> list[dict[str, str]]:
        """Return each row as a mapping from column to text."""
        return [dict(zip(self.header, row, strict=True)) for row in self.rows]


def read_delimited(text: str, delimiter: str = ",") -> Delimited:
    """Split CSV into texts; quoted line ends are part of a text, empty lines are left out.

    Raises:
        ValueError: if there is no header, a column is there twice, a quote is misplaced, a row has
            more or fewer fields than the header, or a field is below no name.
    """
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    rows, lines, line = [], [], 1
    try:
        for fields in reader:
            if fields and not header:
                header = _distinct(fields)
            elif fields:
                _check(fields, header, f"line {line}, row {len(rows)}")
                rows.append(fields)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}, row {len(rows)}: {error}") from error
    if not header:
        raise ValueError("it is empty")
    return Delimited(header, rows, lines)


def _distinct(header: list[str]) -> list[str]:
    if (name := repeated([name for name in header if name])) is not None:
        raise ValueError(f"line 1: the column {name!r} is there twice")
    return header


def repeated(names: Iterable[str]) -> str | None:
    """Return the first name that occurs twice; None if none does."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _check(fields: list[str], header: list[str], where: str) -> None:
    """Raise ValueError unless a row has one field for each named column."""
    counted = f"{where}: got {len(fields)} fields, wanted {len(header)} as the header names"
    if len(fields) < len(header):
        raise ValueError(f"{counted}, and the column {header[len(fields)]!r} is left without")
    if len(fields) > len(header):
        raise ValueError(f"{counted}, and {fields[len(header)][:40]!r} has no column: {_REMEDY}")
    # Other programs leave a first column of row numbers without a name, and columns of nothing.
    for name, field in list(zip(header, fields, strict=True))[1:]:
        if field and not name:
            raise ValueError(f"{where}: {field[:40]!r} stands below no name: {_REMEDY}")
