"""Columns of a report's tables, on the page and in files."""

from collections.abc import Sequence
from dataclasses import replace

from cachepress.evaluation.statistics import Estimate
from cachepress.evaluation.tables import (
    ESTIMATE,
    TEXT,
    Column,
    SheetCell,
    latex,
    markdown,
    markdown_text,
    printed,
    sheet_line,
    spreadsheet,
)
from cachepress.pages.panels import Entry, Panel, settings_of

MIB = 2**20


def columns(panel: Panel) -> list[Column[Entry]]:
    """Make all columns of a panel: measurements, and the settings that differ."""
    named = (_PRESS, *_MEASURED, *_tasks(panel), *_reported(panel), *_settings(panel), *_NAMES)
    return [replace(one, hint=_HINTS.get(one.title, one.hint)) for one in named]


def markdown_page(panels: Sequence[Panel]) -> str:
    """Format a table for each panel, in Markdown."""
    return "\n".join(_markdown_panel(panel) for panel in panels)


def latex_page(panels: Sequence[Panel]) -> str:
    r"""Format a table for each panel, in LaTeX; it needs ``\usepackage{booktabs}``."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex_panel(panel) for panel in panels)


def sheet(panels: Sequence[Panel]) -> str:
    """Format all panels as one table for spreadsheets: a line for each result, numbers in full."""
    return spreadsheet([_sheet_line(panel, entry) for panel in panels for entry in panel.entries])


def _sheet_line(panel: Panel, entry: Entry) -> dict[str, SheetCell]:
    about: dict[str, SheetCell] = {"of": panel.title, "notes": "; ".join(panel.notes)}
    return about | sheet_line(columns(panel), entry)


def _markdown_panel(panel: Panel) -> str:
    head = f"## {markdown_text(panel.title)}\n\n{markdown_text('; '.join(panel.notes))}\n\n"
    kinds = printed(columns(panel), panel.entries)
    return head + markdown(kinds, panel.entries) + "\n"


def _latex_panel(panel: Panel) -> str:
    caption = "; ".join([panel.title, *panel.notes])
    return latex(printed(columns(panel), panel.entries), panel.entries, caption) + "\n"


_PRESS: Column[Entry] = Column("press", lambda e: e.name, printed=True, kind=TEXT)
_MEASURED: tuple[Column[Entry], ...] = (
    Column("nominal ratio", lambda e: e.run.ratio, ".2f", printed=True),
    Column("ratio", lambda e: e.metrics.compression_ratio, ".3f", printed=True),
    Column("kept bytes", lambda e: e.kept, ".3f", printed=True),
    Column("score", lambda e: e.metrics.score, printed=True, kind=ESTIMATE),
    Column("vs no_press", lambda e: e.difference, "+", printed=True, kind=ESTIMATE),
    Column("flips", lambda e: e.versus and e.versus.flips, ".3f"),
    Column("same answers", lambda e: e.same, ".3f"),
    Column("KL", lambda e: e.metrics.kl, printed=True, kind=ESTIMATE),
    Column("perplexity", lambda e: e.metrics.perplexity, kind=ESTIMATE),
    Column("MiB before", lambda e: e.metrics.cache_bytes_before / MIB, ".1f"),
    Column("MiB after", lambda e: e.metrics.cache_bytes_after / MIB, ".1f", printed=True),
    Column("prefill s", lambda e: e.metrics.prefill_seconds, ".2f", printed=True),
    Column("press s", lambda e: e.metrics.press_seconds, ".3f"),
    Column("tokens/s", lambda e: e.metrics.speeds[0], ".1f", printed=True),
    Column("peak MiB", lambda e: _mib(e.metrics.peak_memory_bytes), ",.0f"),
    Column("tokens", lambda e: e.metrics.context_tokens, ",.0f"),
    Column("cut tokens", lambda e: e.metrics.cut_tokens, ",.0f"),
    Column("samples", lambda e: e.metrics.samples, ".0f"),
    Column("contexts", lambda e: e.metrics.contexts, ".0f"),
    Column("Pareto front", lambda e: _fronts(e), kind=TEXT),
)
_NAMES: tuple[Column[Entry], ...] = (
    Column("spelling", lambda e: e.run.spelling, kind=TEXT),
    Column("folder", lambda e: e.run.folder, kind=TEXT),
)
_HINTS = {
    "press": "Name of the press.",
    "nominal ratio": "Ratio that was asked for.",
    "ratio": "Share of pairs evicted, measured.",
    "kept bytes": "Bytes after, of those without a press.",
    "score": "Mean score, 95 % interval.",
    "vs no_press": "Difference on the same samples, 95 % interval.",
    "flips": "Share of samples right in one, wrong in the other.",
    "same answers": "Share of samples with the very same answer.",
    "KL": "Divergence from no press, 95 % interval.",
    "perplexity": "Perplexity of the wanted, 95 % interval.",
    "MiB before": "Of an uncompressed cache.",
    "MiB after": "What is allocated.",
    "prefill s": "Median, compression included.",
    "press s": "What the press added, median.",
    "tokens/s": "Decoding speed, median.",
    "peak MiB": "Most memory in use.",
    "tokens": "Tokens of a context, mean.",
    "cut tokens": "Tokens of contexts that were cut.",
    "samples": "Number of samples.",
    "contexts": "Number of contexts.",
    "Pareto front": "By score, among those that can be told apart.",
    "spelling": "The press as it is written.",
    "folder": "Name of the result folder.",
}
"""What columns mean, in a sentence."""


def _mib(nbytes: float | None) -> float | None:
    return None if nbytes is None else nbytes / MIB


def _fronts(entry: Entry) -> str | None:
    names = {("score", "kept"): "bytes", ("score", "speed"): "speed"}
    return ", ".join(name for key, name in names.items() if entry.fronts[key]) or None


def _tasks(panel: Panel) -> list[Column[Entry]]:
    """Make the columns of the score of each task, if there are several."""
    names = dict.fromkeys(name for entry in panel.entries for name in entry.metrics.tasks)
    return [_task(name) for name in names] if len(names) > 1 else []


def _task(name: str) -> Column[Entry]:
    hint = "Score of this task."
    return Column(f"task {name}", lambda e: e.metrics.tasks.get(name), "", hint, kind=ESTIMATE)


def _reported(panel: Panel) -> list[Column[Entry]]:
    """Make the columns of what benchmarks report beside the score."""
    every = [entry.metrics.reported for entry in panel.entries]
    names = dict.fromkeys((t, name) for one in every for t in one for name in one[t])
    return [_report(task, name) for task, name in names]


def _report(task: str, name: str) -> Column[Entry]:
    def reported(entry: Entry) -> Estimate | None:
        return entry.metrics.reported.get(task, {}).get(name)

    hint = "What the benchmark reports of this task beside the score, 95 % interval."
    return Column(f"{task}: {name}", reported, "", hint, kind=ESTIMATE)


def _settings(panel: Panel) -> list[Column[Entry]]:
    """Make the columns of the settings that differ."""
    shown_already = {*panel.shared, "press", "press_name", "compression_ratio"}
    names = dict.fromkeys(name for entry in panel.entries for name in settings_of(entry.run))
    return [_setting(name) for name in names if name not in shown_already]


def _setting(name: str) -> Column[Entry]:
    def told(entry: Entry) -> str | None:
        return settings_of(entry.run).get(name)

    def number(entry: Entry) -> float | str | None:
        value = entry.run.config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        return told(entry)

    return Column(name, told, hint="A setting.", kind=TEXT, in_sheet=number)
