"""The numbers of a panel as a table: for the page, for Markdown and for LaTeX."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from cachepress.evaluation.spreadsheet import SheetCell, estimated, spreadsheet
from cachepress.evaluation.statistics import Estimate
from cachepress.pages.panels import Entry, Panel, finite, settings_of

Sort = float | str | None
NOTHING = "\u2013"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its header.
        hint: what it means, in a sentence.
        text: what stands in it.
        sort: what it is sorted by; None comes last.
        printed: whether it has a place in the narrow tables, Markdown and LaTeX.
        numeric: whether it holds numbers.
        sheet: what it is in a table for spreadsheets; None for its text.
    """

    title: str
    hint: str
    text: Callable[[Entry], str]
    sort: Callable[[Entry], Sort]
    printed: bool = False
    numeric: bool = True
    sheet: Callable[[Entry], dict[str, SheetCell]] | None = None


def columns(panel: Panel) -> list[Column]:
    """Every column of a panel: what was measured, and the settings that differ."""
    return [
        _text("press", "Name of the press.", lambda e: e.name, printed=True),
        *_MEASURED,
        *_tasks(panel),
        *_reported(panel),
        *_settings(panel),
        _text("spelling", "The press as it is written.", lambda e: e.run.spelling),
        _text("folder", "Name of the result folder.", lambda e: e.run.folder),
    ]


def markdown(panels: Sequence[Panel]) -> str:
    """A table for each panel, in Markdown."""
    return "\n".join(_markdown_panel(panel) for panel in panels)


def latex(panels: Sequence[Panel]) -> str:
    r"""A table for each panel, in LaTeX; it needs ``\usepackage{booktabs}``."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex_panel(panel) for panel in panels)


def sheet(panels: Sequence[Panel]) -> str:
    """All panels as one table for spreadsheets: a line for each result, numbers in full."""
    return spreadsheet([_sheet_row(panel, entry) for panel in panels for entry in panel.entries])


def _sheet_row(panel: Panel, entry: Entry) -> dict[str, SheetCell]:
    row: dict[str, SheetCell] = {"of": panel.title, "notes": "; ".join(panel.notes)}
    for column in columns(panel):
        row |= _sheet_cells(column, entry)
    return row


def _sheet_cells(column: Column, entry: Entry) -> dict[str, SheetCell]:
    if column.sheet is not None:
        return column.sheet(entry)
    text = column.text(entry)
    return {column.title: None if text == NOTHING else text}


def interval_text(estimate: Estimate | None, digits: int = 2) -> str:
    """An interval, or "±?" where nothing is known of it."""
    if estimate is None:
        return NOTHING
    if finite(estimate.low) is None or finite(estimate.high) is None:
        return "±?"
    return f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"


def estimate_text(estimate: Estimate | None, digits: int = 3, sign: str = "") -> str:
    """A mean with its interval."""
    if estimate is None or finite(estimate.mean) is None:
        return NOTHING
    ends = interval_text(estimate)
    return f"{estimate.mean:{sign}.{digits}f} " + (ends if ends == "±?" else f"({ends})")


def _text(title: str, hint: str, of: Callable[[Entry], str], printed: bool = False) -> Column:
    return Column(title, hint, of, of, printed, numeric=False)


def _number(
    title: str,
    hint: str,
    of: Callable[[Entry], float | None],
    form: str,
    printed: bool = False,
) -> Column:
    def text(entry: Entry) -> str:
        value = finite(of(entry))
        return NOTHING if value is None else format(value, form)

    def value(entry: Entry) -> float | None:
        return finite(of(entry))

    return Column(title, hint, text, value, printed, sheet=lambda entry: {title: value(entry)})


def _estimate(
    title: str,
    hint: str,
    of: Callable[[Entry], Estimate | None],
    sign: str = "",
    printed: bool = False,
) -> Column:
    def sort(entry: Entry) -> Sort:
        estimate = of(entry)
        return None if estimate is None else finite(estimate.mean)

    def text(entry: Entry) -> str:
        return estimate_text(of(entry), sign=sign)

    def sheet(entry: Entry) -> dict[str, SheetCell]:
        estimate = of(entry)
        return estimated(title, None if estimate is None else asdict(estimate))

    return Column(title, hint, text, sort, printed, sheet=sheet)


def _difference(entry: Entry) -> Estimate | None:
    return None if entry.versus is None else entry.versus.difference


def _flips(entry: Entry) -> float | None:
    return None if entry.versus is None else entry.versus.flips


def _mib(nbytes: float | None) -> float | None:
    return None if nbytes is None else nbytes / 2**20


def _fronts(entry: Entry) -> str:
    names = {("score", "kept"): "bytes", ("score", "speed"): "speed"}
    return ", ".join(name for key, name in names.items() if entry.fronts[key]) or NOTHING


def _size(of: Callable[[Estimate], int]) -> Callable[[Entry], float | None]:
    def size(entry: Entry) -> float | None:
        run = entry.run
        estimate = next((e for e in (run.score, run.kl, run.perplexity) if e is not None), None)
        return None if estimate is None else of(estimate)

    return size


_MEASURED = (
    _number("nominal ratio", "Ratio that was asked for.", lambda e: e.run.ratio, ".2f", True),
    _number("ratio", "Share of pairs dropped, measured.", lambda e: e.run.achieved, ".3f", True),
    _number("kept bytes", "Bytes after, of those without a press.", lambda e: e.kept, ".3f", True),
    _estimate("score", "Mean score, 95 % interval.", lambda e: e.run.score, printed=True),
    _estimate(
        "vs no_press", "Difference on the same samples, 95 % interval.", _difference, "+", True
    ),
    _number("flips", "Share of samples right in one, wrong in the other.", _flips, ".3f"),
    _number("same answers", "Share of samples with the very same answer.", lambda e: e.same, ".3f"),
    _estimate("KL", "Divergence from no press, 95 % interval.", lambda e: e.run.kl, printed=True),
    _estimate("perplexity", "Perplexity of the wanted, 95 % interval.", lambda e: e.run.perplexity),
    _number(
        "MiB before",
        "Of an uncompressed cache.",
        lambda e: _mib(e.run.bytes_before),
        ".1f",
    ),
    _number(
        "MiB after",
        "What is allocated.",
        lambda e: _mib(e.run.bytes_after),
        ".1f",
        True,
    ),
    _number(
        "prefill s", "Median, compression included.", lambda e: e.run.prefill_seconds, ".2f", True
    ),
    _number("press s", "What the press added, median.", lambda e: e.run.press_seconds, ".3f"),
    _number("tokens/s", "Decoding speed, median.", lambda e: e.run.speed, ".1f", True),
    _number("peak MiB", "Most memory in use.", lambda e: _mib(e.run.peak_bytes), ",.0f"),
    _number("tokens", "Tokens of a context, mean.", lambda e: e.run.context_tokens, ",.0f"),
    _number("cut tokens", "Tokens of contexts that were cut.", lambda e: e.run.cut_tokens, ",.0f"),
    _number("samples", "Number of samples.", _size(lambda estimate: estimate.samples), ".0f"),
    _number("contexts", "Number of contexts.", _size(lambda estimate: estimate.contexts), ".0f"),
    _text("Pareto front", "By score, among those that can be told apart.", _fronts),
)


def _tasks(panel: Panel) -> list[Column]:
    names = dict.fromkeys(name for entry in panel.entries for name in entry.run.tasks)
    if len(names) < 2:
        return []
    return [_estimate(f"task {name}", "Score of this task.", _task(name)) for name in names]


def _task(name: str) -> Callable[[Entry], Estimate | None]:
    return lambda entry: entry.run.tasks.get(name)


def _reported(panel: Panel) -> list[Column]:
    """What benchmarks report of tasks beside the score."""
    every = [entry.run.reported for entry in panel.entries]
    names = dict.fromkeys((t, name) for one in every for t in one for name in one[t])
    hint = "What the benchmark reports of this task beside the score, 95 % interval."
    return [_estimate(f"{task}: {name}", hint, _report(task, name)) for task, name in names]


def _report(task: str, name: str) -> Callable[[Entry], Estimate | None]:
    return lambda entry: entry.run.reported.get(task, {}).get(name)


def _settings(panel: Panel) -> list[Column]:
    shown_already = {*panel.shared, "press", "press_name", "compression_ratio"}
    runs = [entry.run for entry in panel.entries]
    names = dict.fromkeys(name for run in runs for name in settings_of(run))
    left = [name for name in names if name not in shown_already]
    return [_setting(name) for name in left]


def _setting(name: str) -> Column:
    def text(entry: Entry) -> str:
        return settings_of(entry.run).get(name, NOTHING)

    def sheet(entry: Entry) -> dict[str, SheetCell]:
        value = entry.run.config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {name: value}
        return {name: settings_of(entry.run).get(name)}

    return Column(name, "A setting.", text, text, numeric=False, sheet=sheet)


def _markdown_panel(panel: Panel) -> str:
    kinds = _printed(panel)
    lines = [
        f"## {_markdown_text(panel.title)}",
        "",
        _markdown_text("; ".join(panel.notes)),
        "",
        _markdown_line([kind.title for kind in kinds]),
        _markdown_line(["---:" if kind.numeric else "---" for kind in kinds], plain=True),
        *(_markdown_line([kind.text(entry) for kind in kinds]) for entry in panel.entries),
    ]
    return "\n".join(lines) + "\n"


def _markdown_line(texts: list[str], plain: bool = False) -> str:
    return "| " + " | ".join(t if plain else _markdown_text(t) for t in texts) + " |"


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", " ".join(text.split()))


def _printed(panel: Panel) -> list[Column]:
    """The columns of the narrow tables in which anything stands."""
    kinds = [column for column in columns(panel) if column.printed]
    return [kind for kind in kinds if any(kind.text(e) != NOTHING for e in panel.entries)]


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


def _latex_panel(panel: Panel) -> str:
    kinds = _printed(panel)
    form = "".join("r" if kind.numeric else "l" for kind in kinds)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex_text(panel.title + '; ' + '; '.join(panel.notes))}}}",
        rf"\begin{{tabular}}{{{form}}}",
        r"\toprule",
        _latex_line([kind.title for kind in kinds]),
        r"\midrule",
        *(_latex_line([kind.text(entry) for kind in kinds]) for entry in panel.entries),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_line(texts: list[str]) -> str:
    return " & ".join(map(_latex_text, texts)) + r" \\"


def _latex_text(text: str) -> str:
    escaped = "".join(_LATEX.get(c, c) for c in " ".join(text.split()))
    # The minus of a number is no hyphen.
    return re.sub(r"(?<![\w}])-(?=\d)", "$-$", escaped)
