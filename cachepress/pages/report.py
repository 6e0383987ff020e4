"""Writes a report of a folder of results: page, pictures and tables (``cachepress report``)."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import cachepress
from cachepress.errors import CachepressError
from cachepress.evaluation.records import write_atomically
from cachepress.evaluation.statistics import finite
from cachepress.pages.columns import columns, latex_page, markdown_page, sheet
from cachepress.pages.html import render
from cachepress.pages.needle import needle_of
from cachepress.pages.panels import (
    COSTS,
    QUALITIES,
    Entry,
    Panel,
    make_panels,
    quality_of,
)
from cachepress.pages.pictures import write_pictures
from cachepress.pages.saved import read_runs

FORMATS = ("html", "png", "svg", "md", "latex", "csv")


def write_report(
    folder: Path, output: Path | None = None, formats: Sequence[str] = ("html",)
) -> list[Path]:
    """Write a report of every finished result of a folder.

    Args:
        folder: a folder of result folders.
        output: folder for what is written; None for ``folder`` itself.
        formats: any of "html", "png", "svg", "md", "latex" and "csv", which is for spreadsheets.

    Returns:
        The files that were written.

    Raises:
        CachepressError: if a format is unknown, if a file of a result is damaged or foreign, or if
            there is no finished result.
    """
    for name in formats:
        if name not in FORMATS:
            raise CachepressError(f"format: got {name!r}, wanted one of {', '.join(FORMATS)}")
    runs, unfinished = read_runs(folder)
    panels = make_panels(runs)
    output = folder if output is None else output
    output.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name in dict.fromkeys(formats):
        written += _write(name, panels, unfinished, output)
    return written


def _write(name: str, panels: list[Panel], unfinished: list[str], output: Path) -> list[Path]:
    if name in ("png", "svg"):
        return write_pictures(panels, output, name)
    if name == "html":
        path, text = output / "report.html", report_page(panels, unfinished)
    elif name == "md":
        path, text = output / "table.md", markdown_page(panels)
    elif name == "csv":
        path, text = output / "table.csv", sheet(panels)
    else:
        path, text = output / "table.tex", latex_page(panels)
    write_atomically(path, text)
    return [path]


def report_page(panels: Sequence[Panel], unfinished: Sequence[str]) -> str:
    """Render the report as an HTML page."""
    # Its import takes a moment, and only the page needs it.
    from plotly.offline import get_plotlyjs

    values = {
        "panels": panels,
        "unfinished": unfinished,
        "version": cachepress.__version__,
        "plotly": get_plotlyjs(),
        "columns": [columns(panel) for panel in panels],
        "data": [panel_data(panel) for panel in panels],
        "samples": [sample_data(panel) for panel in panels],
    }
    return render("report.html.jinja", values)


def panel_data(panel: Panel) -> dict[str, object]:
    """Make the data of a panel's charts."""
    return {
        "title": panel.title,
        "presses": panel.presses,
        "qualities": _measured(panel),
        "cells": [_entry_data(entry) for entry in panel.entries],
    }


def sample_data(panel: Panel) -> dict[str, object]:
    """Make the table of a panel's questions and answers, in one order for all runs."""
    tables = [entry.run.predictions for entry in panel.entries]
    ids = list(dict.fromkeys(name for table in tables for name in table.index))
    whole = pd.concat(tables)
    first = whole.loc[~whole.index.duplicated()].reindex(ids)
    about = ("question", "answer", "task", "metric", "length", "depth", "choices", "answer_prefix")
    columns_of = {name: _listed(first, name) for name in about}
    answers = [_answers(table.reindex(ids)) for table in tables]
    return {"ids": ids, **columns_of, "cells": answers}


def _answers(table: pd.DataFrame) -> dict[str, list[object]]:
    return {name: _listed(table, name) for name in ("predicted_answer", "score", "kl")}


def _listed(table: pd.DataFrame, name: str) -> list[object]:
    """Convert a column to a list, with None for NaN."""
    return [None if isinstance(x, float) and math.isnan(x) else x for x in table[name].tolist()]


def _measured(panel: Panel) -> dict[str, str]:
    """Return the qualities that any run of a panel has, with their titles."""
    runs = [entry.run for entry in panel.entries]
    return {
        name: title
        for name, title in QUALITIES.items()
        if any(quality_of(run, name) is not None for run in runs)
    }


def _entry_data(entry: Entry) -> dict[str, object]:
    run, metrics = entry.run, entry.run.metrics
    speed, low, high = map(finite, metrics.speeds)
    return {
        "label": entry.label,
        "press": run.press,
        "guest": entry.guest,
        "base": entry.base is None,
        "ratio": run.ratio,
        "achieved": metrics.compression_ratio,
        "kept": finite(entry.kept),
        "speed": speed,
        "speed_low": low,
        "speed_high": high,
        "before": metrics.cache_bytes_before,
        "after": metrics.cache_bytes_after,
        "prefill": metrics.prefill_seconds,
        "added": metrics.press_seconds,
        "qualities": {name: quality_of(run, name) for name in QUALITIES},
        "difference": entry.difference,
        "fronts": {
            cost: [name for name in QUALITIES if entry.fronts[name, cost]] for cost in COSTS
        },
        "leads": [name for name in QUALITIES if any(entry.leads[name, cost] for cost in COSTS)],
        "needle": needle_of(run),
    }
