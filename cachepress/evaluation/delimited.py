"""CSV read as what it is: rows of texts, none of them guessed at and none shifted."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass

LONGEST_FIELD = 1 << 30


@dataclass(frozen=True)
class Delimited:
    """A table of texts.

    Attributes:
        header: names of the columns.
        rows: the texts of each row, as many as there are columns.
        lines: the line of the file on which each row begins.
    """

    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def records(self) -> list[dict[str, str]]:
        """The rows by the names of their columns."""
        return [dict(zip(self.header, row, strict=True)) for row in self.rows]


def read_delimited(text: str, delimiter: str = ",") -> Delimited:
    """Split CSV into texts; quoted line ends are part of a text, empty lines are left out.

    Raises:
        ValueError: if there is no header, a column is there twice, a quote is misplaced, or a row
            has more or fewer fields than the header.
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
                if len(fields) != len(header):
                    raise ValueError(_misfit(line, len(rows), fields, header))
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
    """The first name that is there a second time."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _misfit(line: int, row: int, fields: list[str], header: list[str]) -> str:
    """What is wrong with a row of another length than the header's."""
    where = f"line {line}, row {row}: got {len(fields)} fields, wanted {len(header)} as the header"
    if len(fields) < len(header):
        return f"{where} names, and the column {header[len(fields)]!r} is left without"
    surplus = fields[len(header)]
    return (
        f"{where} names, and {surplus[:40]!r} has no column: name every column, and put what holds "
        "the delimiter into quotes"
    )
