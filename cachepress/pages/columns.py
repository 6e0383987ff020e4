"""The columns of a report's tables, on the page and in files: what was measured of each run."""

from collections.abc import Sequence
from dataclasses import replace

from cachepress.evaluation.statistics import Estimate
from cachepress.evaluation.tables import (
    Column,
    SheetCell,
    latex,
    markdown,
    markdown_text,
    of_estimate,
    of_number,
    of_text,
    printed,
    sheet_line,
    spreadsheet,
)
from cachepress.pages.panels import Entry, Panel, settings_of

MIB = 2**20


def columns(panel: Panel) -> list[Column[Entry]]:
    """Every column of a panel: what was measured, and the settings that differ."""
    return [
        of_text("press", lambda e: e.name, "Name of the press.", printed=True),
        *_MEASURED,
        *_tasks(panel),
        *_reported(panel),
        *_settings(panel),
        of_text("spelling", lambda e: e.run.spelling, "The press as it is written."),
        of_text("folder", lambda e: e.run.folder, "Name of the result folder."),
    ]


def markdown_page(panels: Sequence[Panel]) -> str:
    """A table for each panel, in Markdown."""
    return "\n".join(_markdown_panel(panel) for panel in panels)


def latex_page(panels: Sequence[Panel]) -> str:
    r"""A table for each panel, in LaTeX; it needs ``\usepackage{booktabs}``."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex_panel(panel) for panel in panels)


def sheet(panels: Sequence[Panel]) -> str:
    """All panels as one table for spreadsheets: a line for each result, numbers in full."""
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


_MEASURED: tuple[Column[Entry], ...] = (
    of_number("nominal ratio", lambda e: e.run.ratio, ".2f", "Ratio that was asked for.", True),
    of_number(
        "ratio",
        lambda e: e.metrics.compression_ratio,
        ".3f",
        "Share of pairs dropped, measured.",
        True,
    ),
    of_number(
        "kept bytes", lambda e: e.kept, ".3f", "Bytes after, of those without a press.", True
    ),
    of_estimate("score", lambda e: e.metrics.score, "", "Mean score, 95 % interval.", True),
    of_estimate(
        "vs no_press",
        lambda e: e.versus and e.versus.difference,
        "+",
        "Difference on the same samples, 95 % interval.",
        True,
    ),
    of_number(
        "flips",
        lambda e: e.versus and e.versus.flips,
        ".3f",
        "Share of samples right in one, wrong in the other.",
    ),
    of_number(
        "same answers", lambda e: e.same, ".3f", "Share of samples with the very same answer."
    ),
    of_estimate("KL", lambda e: e.metrics.kl, "", "Divergence from no press, 95 % interval.", True),
    of_estimate(
        "perplexity", lambda e: e.metrics.perplexity, "", "Perplexity of the wanted, 95 % interval."
    ),
    of_number(
        "MiB before",
        lambda e: e.metrics.cache_bytes_before / MIB,
        ".1f",
        "Of an uncompressed cache.",
    ),
    of_number(
        "MiB after", lambda e: e.metrics.cache_bytes_after / MIB, ".1f", "What is allocated.", True
    ),
    of_number(
        "prefill s",
        lambda e: e.metrics.prefill_seconds,
        ".2f",
        "Median, compression included.",
        True,
    ),
    of_number("press s", lambda e: e.metrics.press_seconds, ".3f", "What the press added, median."),
    of_number("tokens/s", lambda e: e.metrics.speeds[0], ".1f", "Decoding speed, median.", True),
    of_number(
        "peak MiB", lambda e: _mib(e.metrics.peak_memory_bytes), ",.0f", "Most memory in use."
    ),
    of_number("tokens", lambda e: e.metrics.context_tokens, ",.0f", "Tokens of a context, mean."),
    of_number(
        "cut tokens", lambda e: e.metrics.cut_tokens, ",.0f", "Tokens of contexts that were cut."
    ),
    of_number(
        "samples",
        lambda e: e.metrics.sizes and e.metrics.sizes.samples,
        ".0f",
        "Number of samples.",
    ),
    of_number(
        "contexts",
        lambda e: e.metrics.sizes and e.metrics.sizes.contexts,
        ".0f",
        "Number of contexts.",
    ),
    of_text("Pareto front", lambda e: _fronts(e), "By score, among those that can be told apart."),
)


def _mib(nbytes: float | None) -> float | None:
    return None if nbytes is None else nbytes / MIB


def _fronts(entry: Entry) -> str | None:
    names = {("score", "kept"): "bytes", ("score", "speed"): "speed"}
    return ", ".join(name for key, name in names.items() if entry.fronts[key]) or None


def _tasks(panel: Panel) -> list[Column[Entry]]:
    names = dict.fromkeys(name for entry in panel.entries for name in entry.metrics.tasks)
    if len(names) < 2:
        return []
    return [_task(name) for name in names]


def _task(name: str) -> Column[Entry]:
    return of_estimate(
        f"task {name}", lambda e: e.metrics.tasks.get(name), "", "Score of this task."
    )


def _reported(panel: Panel) -> list[Column[Entry]]:
    """What benchmarks report of tasks beside the score."""
    every = [entry.metrics.reported for entry in panel.entries]
    names = dict.fromkeys((t, name) for one in every for t in one for name in one[t])
    return [_report(task, name) for task, name in names]


def _report(task: str, name: str) -> Column[Entry]:
    hint = "What the benchmark reports of this task beside the score, 95 % interval."

    def reported(entry: Entry) -> Estimate | None:
        return entry.metrics.reported.get(task, {}).get(name)

    return of_estimate(f"{task}: {name}", reported, "", hint)


def _settings(panel: Panel) -> list[Column[Entry]]:
    shown_already = {*panel.shared, "press", "press_name", "compression_ratio"}
    names = dict.fromkeys(name for entry in panel.entries for name in settings_of(entry.run))
    return [_setting(name) for name in names if name not in shown_already]


def _setting(name: str) -> Column[Entry]:
    def sheet(entry: Entry) -> dict[str, SheetCell]:
        value = entry.run.config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {name: value}
        return {name: settings_of(entry.run).get(name)}

    return replace(of_text(name, lambda e: settings_of(e.run).get(name), "A setting."), sheet=sheet)
