"""Formats tables of columns for terminals, Markdown, LaTeX and spreadsheets.

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
Value = Estimate | float | str | None
TEXT, NUMBER, ESTIMATE = "text", "number", "estimate"
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
    """Column of a table: its title, values and format.

    Attributes:
        title: its header.
        of: the value of a line: a text, a number, a mean with its interval, or nothing.
        form: format of numbers; of means, "+" where they have a sign.
        hint: what it means, in a sentence.
        printed: whether it has a place in narrow tables.
        kind: what its values are: ``TEXT``, ``NUMBER`` or ``ESTIMATE``.
        in_sheet: the value in a table for spreadsheets, if that is another.
    """

    title: str
    of: Callable[[T], Value]
    form: str = ""
    hint: str = ""
    printed: bool = False
    kind: str = NUMBER
    in_sheet: Callable[[T], Value] | None = None

    @property
    def numeric(self) -> bool:
        """Whether it holds numbers."""
        return self.kind != TEXT

    def text(self, line: T) -> str:
        """Format the value of a line."""
        value = self.of(line)
        if isinstance(value, Estimate):
            return estimate_text(value, self.form)
        if isinstance(value, str):
            return value
        return NOTHING if finite(value) is None else format(value, self.form)

    def sort(self, line: T) -> float | str | None:
        """Return the value that lines are sorted by, numbers in full; None comes last."""
        value = self.of(line)
        value = value.mean if isinstance(value, Estimate) else value
        return self.text(line) if self.kind == TEXT or isinstance(value, str) else finite(value)

    def cells(self, line: T) -> dict[str, SheetCell]:
        """Return the cells of a line in a spreadsheet by header: three for an estimate."""
        value = (self.in_sheet or self.of)(line)
        if self.kind != ESTIMATE or not isinstance(value, Estimate | None):
            return {self.title: value.mean if isinstance(value, Estimate) else value}
        ends = (None, None, None) if value is None else (value.mean, value.low, value.high)
        return {f"{self.title}{end}": x for end, x in zip(("", " low", " high"), ends, strict=True)}


def estimate_text(estimate: Estimate | None, sign: str = "") -> str:
    """Format a mean with its interval, or "±?" if that is unknown."""
    if estimate is None or finite(estimate.mean) is None:
        return NOTHING
    ends = interval_text(estimate)
    return f"{estimate.mean:{sign}.3f} " + (f"({ends})" if ends else "±?")


def interval_text(estimate: Estimate) -> str:
    """Format an interval; "" if it is unknown."""
    if finite(estimate.low) is None or finite(estimate.high) is None:
        return ""
    return f"{estimate.low:.2f} to {estimate.high:.2f}"


def table(
    columns: Sequence[Column[T]], lines: Sequence[T], style: str = "simple", align: str = "right"
) -> str:
    """Format a table for a terminal, or in another format of tabulate; the first column is a name.

    What is unknown is empty.
    """
    titles, *texts = _texts(columns, lines)
    texts = [["" if text == NOTHING else text for text in line] for line in texts]
    sides = ("left", *[align] * (len(columns) - 1))
    return tabulate(texts, titles, tablefmt=style, colalign=sides, disable_numparse=True)


def printed(columns: Sequence[Column[T]], lines: Sequence[T]) -> list[Column[T]]:
    """Choose the columns for narrow tables, without those that are empty."""
    kinds = [column for column in columns if column.printed]
    return [kind for kind in kinds if any(kind.text(line) != NOTHING for line in lines)]


def markdown(columns: Sequence[Column[T]], lines: Sequence[T]) -> str:
    """Format a table in Markdown, every text escaped."""
    rule = "| " + " | ".join("---:" if column.numeric else "---" for column in columns) + " |"
    head, *rest = [
        "| " + " | ".join(map(markdown_text, texts)) + " |" for texts in _texts(columns, lines)
    ]
    return "\n".join([head, rule, *rest])


def markdown_text(text: str) -> str:
    """Escape a text for Markdown."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", " ".join(text.split()))


def latex(columns: Sequence[Column[T]], lines: Sequence[T], caption: str) -> str:
    r"""Format a table in LaTeX with a caption; it needs ``\usepackage{booktabs}``."""
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
    """Format the headers and the values of each line."""
    titles = [column.title for column in columns]
    return [titles, *([column.text(line) for column in columns] for line in lines)]


def sheet_line(columns: Sequence[Column[T]], line: T) -> dict[str, SheetCell]:
    """Return the cells of a line in a spreadsheet, by header."""
    return {name: value for column in columns for name, value in column.cells(line).items()}


def spreadsheet(lines: Sequence[Mapping[str, SheetCell]]) -> str:
    """Format lines as CSV for spreadsheets, with a column for each header that any line has.

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
