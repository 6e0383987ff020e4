"""Tables that are made for spreadsheets: CSV in which no text is taken for a formula."""

import csv
import io
import math
from collections.abc import Mapping, Sequence

SheetCell = float | str | None
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a text begins with that a spreadsheet computes, or in front of which it looks past it."""


def spreadsheet(rows: Sequence[Mapping[str, SheetCell]]) -> str:
    """Rows as CSV with a column for each name that any of them has.

    Texts are quoted, and begin with an apostrophe where a spreadsheet would compute them; numbers
    are numbers in full, whatever their sign. What is not known, or is no finite number, is empty.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow([_shown(name) for name in names])
    writer.writerows([_shown(row.get(name)) for name in names] for row in rows)
    return out.getvalue()


def estimated(name: str, estimate: Mapping[str, object] | None) -> dict[str, SheetCell]:
    """The columns of a mean and of its interval's ends."""
    found = estimate or {}
    ends = {"": "mean", " low": "low", " high": "high"}
    return {f"{name}{end}": _number(found.get(key)) for end, key in ends.items()}


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None


def _shown(value: SheetCell) -> SheetCell:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    return "" if value is None or not math.isfinite(value) else value
