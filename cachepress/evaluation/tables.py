"""The one maker of tables: columns over lines, for terminals, Markdown, LaTeX and spreadsheets.

What stands in the tables of sweeps is in ``cachepress.evaluation.summary``, in those of reports in
``cachepress.pages.columns``.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tabulate import tabulate

from cachepress.evaluation.statistics import Estimate, finite

T = TypeVar("T")
SheetCell = float | str | None
NOTHING = "\u2013"
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a text begins with that a spreadsheet computes, or in front of which it looks past it."""
_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    NOTHING: "--",
    "±": r"$\pm$",
}


@dataclass(frozen=True)
class Column(Generic[T]):
    """A column of a table.

    Attributes:
        title: its header.
        text: what stands in it of a line.
        sort: what it is sorted by, a number in full; None comes last.
        sheet: what it is in a table for spreadsheets; None for its text.
        hint: what it means, in a sentence.
        printed: whether it has a place in narrow tables.
        numeric: whether it holds numbers.
    """

    title: str
    text: Callable[[T], str]
    sort: Callable[[T], float | str | None] | None = None
    sheet: Callable[[T], Mapping[str, SheetCell]] | None = None
    hint: str = ""
    printed: bool = False
    numeric: bool = True

    def sorted_by(self, line: T) -> float | str | None:
        """What a line is sorted by."""
        return (self.sort or self.text)(line)

    def cells(self, line: T) -> Mapping[str, SheetCell]:
        """What stands in a table for spreadsheets, by header."""
        if self.sheet is not None:
            return self.sheet(line)
        text = self.text(line)
        return {self.title: None if text == NOTHING else text}


def of_text(
    title: str, of: Callable[[T], str | None], hint: str = "", printed: bool = False
) -> Column[T]:
    """A column of texts."""

    def text(line: T) -> str:
        found = of(line)
        return NOTHING if found is None else found

    return Column(title, text, hint=hint, printed=printed, numeric=False)


def of_number(
    title: str,
    of: Callable[[T], float | None],
    form: str = "",
    hint: str = "",
    printed: bool = False,
) -> Column[T]:
    """A column of numbers, each in a format; what is unknown or not finite is none."""

    def number(line: T) -> float | None:
        return finite(of(line))

    def text(line: T) -> str:
        found = number(line)
        return NOTHING if found is None else format(found, form)

    return Column(title, text, number, lambda line: {title: number(line)}, hint, printed)


def of_estimate(
    title: str,
    of: Callable[[T], Estimate | None],
    sign: str = "",
    hint: str = "",
    printed: bool = False,
) -> Column[T]:
    """A column of means with their intervals; three columns in a table for spreadsheets."""

    def mean(line: T) -> float | None:
        found = of(line)
        return None if found is None else finite(found.mean)

    def text(line: T) -> str:
        return estimate_text(of(line), sign)

    def sheet(line: T) -> dict[str, SheetCell]:
        found = of(line)
        low, high = (None, None) if found is None else (found.low, found.high)
        return {title: mean(line), f"{title} low": low, f"{title} high": high}

    return Column(title, text, mean, sheet, hint, printed)


def estimate_text(estimate: Estimate | None, sign: str = "") -> str:
    """A mean with its interval, or "±?" where nothing is known of it."""
    if estimate is None or finite(estimate.mean) is None:
        return NOTHING
    ends = interval_text(estimate)
    return f"{estimate.mean:{sign}.3f} " + (f"({ends})" if ends else "±?")


def interval_text(estimate: Estimate) -> str:
    """An interval; empty where nothing is known of it."""
    if finite(estimate.low) is None or finite(estimate.high) is None:
        return ""
    return f"{estimate.low:.2f} to {estimate.high:.2f}"


def table(
    columns: Sequence[Column[T]], lines: Sequence[T], style: str = "simple", align: str = "right"
) -> str:
    """A table for a terminal, or in another format of tabulate; the first column is a name."""
    titles, *texts = _texts(columns, lines)
    sides = ("left", *[align] * (len(columns) - 1))
    return tabulate(texts, titles, tablefmt=style, colalign=sides, disable_numparse=True)


def printed(columns: Sequence[Column[T]], lines: Sequence[T]) -> list[Column[T]]:
    """The columns of narrow tables in which anything stands."""
    kinds = [column for column in columns if column.printed]
    return [kind for kind in kinds if any(kind.text(line) != NOTHING for line in lines)]


def markdown(columns: Sequence[Column[T]], lines: Sequence[T]) -> str:
    """A table in Markdown, every text escaped."""
    rule = "| " + " | ".join("---:" if column.numeric else "---" for column in columns) + " |"
    head, *rest = [
        "| " + " | ".join(map(markdown_text, texts)) + " |" for texts in _texts(columns, lines)
    ]
    return "\n".join([head, rule, *rest])


def markdown_text(text: str) -> str:
    """A text as Markdown shows it."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", " ".join(text.split()))


def latex(columns: Sequence[Column[T]], lines: Sequence[T], caption: str) -> str:
    r"""A table in LaTeX with a caption; it needs ``\usepackage{booktabs}``."""
    form = "".join("r" if column.numeric else "l" for column in columns)
    head, *rest = [" & ".join(map(_latex_text, t)) + r" \\" for t in _texts(columns, lines)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex_text(caption)}}}",
            rf"\begin{{tabular}}{{{form}}}",
            r"\toprule",
            head,
            r"\midrule",
            *rest,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _latex_text(text: str) -> str:
    escaped = "".join(_LATEX.get(c, c) for c in " ".join(text.split()))
    # The minus of a number is no hyphen.
    return re.sub(r"(?<![\w}])-(?=\d)", "$-$", escaped)


def _texts(columns: Sequence[Column[T]], lines: Sequence[T]) -> list[list[str]]:
    """The headers, and what stands in each line."""
    titles = [column.title for column in columns]
    return [titles, *([column.text(line) for column in columns] for line in lines)]


def sheet_line(columns: Sequence[Column[T]], line: T) -> dict[str, SheetCell]:
    """A line of a table for spreadsheets, by header."""
    return {name: value for column in columns for name, value in column.cells(line).items()}


def spreadsheet(lines: Sequence[Mapping[str, SheetCell]]) -> str:
    """Lines as CSV for spreadsheets, with a column for each name that any of them has.

    Texts are quoted, and begin with an apostrophe where a spreadsheet would compute them; numbers
    are numbers in full, whatever their sign. What is not known, or is no finite number, is empty.
    """
    names = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow([_sheet_text(name) for name in names])
    writer.writerows([_sheet_text(line.get(name)) for name in names] for line in lines)
    return out.getvalue()


def _sheet_text(value: SheetCell) -> SheetCell:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    return "" if value is None or not math.isfinite(value) else value
