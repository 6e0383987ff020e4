"""Draws static pictures of a report, for papers: quality, speed, and needle scores."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cachepress.evaluation.statistics import Estimate, finite
from cachepress.files import replacing
from cachepress.pages.needle import Needle, needle_of
from cachepress.pages.panels import QUALITIES, Entry, Panel, quality_of
from cachepress.spec import NO_PRESS

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by every kind of eye (Okabe and Ito)."""
LINES = ("-", "--", ":", "-.")
LEGEND_COLUMNS = 3
LONGEST_NAME = 22
MARKERS = ("o", "s", "^", "D", "v", "X", "P")
STYLE: "dict[RcKeyType, object]" = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "cachepress",
    # Names of presses and data are not formulas.
    "text.parse_math": False,
}


def write_pictures(panels: Sequence[Panel], output: Path, form: str) -> list[Path]:
    """Write ``quality``, ``speed`` and ``needle`` as "png" or "svg".

    With more than one panel the names end with the panel's number.
    """
    written = []
    with matplotlib.rc_context(STYLE):
        for number, panel in enumerate(panels, start=1):
            end = f"-{number}" if len(panels) > 1 else ""
            for name, draw in _PICTURES.items():
                figure = draw(panel)
                if figure is not None:
                    written.append(_save(figure, output / f"{name}{end}.{form}", form))
    return written


def quality_picture(panel: Panel) -> Figure | None:
    """Draw quality against kept bytes; None if no run has a quality."""
    return _scatter(panel, "kept", lambda entry: entry.kept, "kept bytes, of those without a press")


def speed_picture(panel: Panel) -> Figure | None:
    """Draw quality against decoding speed; None if no speed was measured."""
    return _scatter(panel, "speed", lambda e: e.run.metrics.speeds[0], "decoded tokens per second")


def needle_picture(panel: Panel) -> Figure | None:
    """Draw a heat map of scores by length and depth for each run; None if no run has both."""
    found = [(entry.label, needle_of(entry.run)) for entry in panel.entries]
    grids = [(label, grid) for label, grid in found if grid is not None]
    if not grids:
        return None
    wide = min(3, len(grids))
    high = math.ceil(len(grids) / wide)
    widest = max(len(grid.lengths) for _, grid in grids)
    size = (wide * max(2.4, 0.55 * widest + 0.9), high * 2.6 + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(high, wide, squeeze=False).ravel())
    for ax, (label, grid) in zip(axes, grids, strict=False):
        _map(ax, label, grid)
    for ax in axes[len(grids) :]:
        ax.set_axis_off()
    _title(figure, panel)
    return figure


_PICTURES: dict[str, Callable[[Panel], Figure | None]] = {
    "quality": quality_picture,
    "speed": speed_picture,
    "needle": needle_picture,
}


class _Drawn(NamedTuple):
    """Result as a point of a picture: its cost and quality."""

    entry: Entry
    x: float
    y: Estimate


def _scatter(
    panel: Panel, cost: str, place: Callable[[Entry], float | None], label: str
) -> Figure | None:
    quality = _first_quality(panel)
    if quality is None:
        return None
    drawn = [
        _Drawn(entry, x, y)
        for entry in panel.entries
        if (y := quality_of(entry.run, quality)) and (x := finite(place(entry)))
    ]
    if not drawn:
        return None
    rows = math.ceil((len(panel.presses) + 1) / LEGEND_COLUMNS)
    figure = Figure(figsize=(5.6, 3.4 + 0.18 * rows), layout="constrained")
    ax = figure.subplots()
    # No press has a look of its own, and takes none from the others.
    for number, press in enumerate(panel.presses, start=-(NO_PRESS in panel.presses)):
        if points := [one for one in drawn if one.entry.run.press == press]:
            _line(ax, press, number, points, cost == "speed")
    front = [one for one in drawn if one.entry.fronts[quality, cost]]
    points = sorted((one.x, one.y.mean) for one in front)
    if points:
        ax.plot(*zip(*points, strict=True), ":", color="0.4", linewidth=1, label="Pareto front")
        ax.plot(*zip(*points, strict=True), "o", color="0.2", mfc="none", markersize=10, zorder=1)
    ax.set_xlabel(label)
    ax.set_ylabel(QUALITIES[quality])
    if cost == "kept":
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=7)
    _title(figure, panel)
    return figure


def _first_quality(panel: Panel) -> str | None:
    runs = [entry.run for entry in panel.entries]
    return next((q for q in QUALITIES if any(quality_of(run, q) is not None for run in runs)), None)


def _noise(entry: Entry) -> tuple[float, float]:
    """Return the distances of a speed's quartiles from its median; 0 if unknown."""
    speed, low, high = map(finite, entry.run.metrics.speeds)
    if speed is None or low is None or high is None:
        return 0.0, 0.0
    return max(0.0, speed - low), max(0.0, high - speed)


def _line(ax: Axes, press: str, number: int, points: list[_Drawn], noisy: bool) -> None:
    """Draw a press over its ratios, with intervals where they are known."""
    points = sorted(points, key=lambda one: one.x)
    noise = [_noise(one.entry) if noisy else (0.0, 0.0) for one in points]
    estimates = [one.y for one in points]
    halves = [
        (e.mean - e.low, e.high - e.mean) if finite(e.low) is not None else (0.0, 0.0)
        for e in estimates
    ]
    ax.errorbar(
        [one.x for one in points],
        [estimate.mean for estimate in estimates],
        yerr=list(zip(*halves, strict=True)),
        xerr=list(zip(*noise, strict=True)) if any(sum(ends) for ends in noise) else None,
        label=shorten(press),
        color="0.1" if press == NO_PRESS else COLOURS[number % len(COLOURS)],
        marker="*" if press == NO_PRESS else MARKERS[number % len(MARKERS)],
        markersize=9 if press == NO_PRESS else 5,
        linestyle=LINES[number // len(COLOURS) % len(LINES)],
        linewidth=1.2,
        elinewidth=0.8,
        capsize=2,
    )


def shorten(name: str) -> str:
    """Shorten a name for a legend."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _map(ax: Axes, label: str, grid: Needle) -> None:
    values = [[math.nan if x is None else x for x in row] for row in grid.scores]
    ax.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(grid.scores):
        for j, score in enumerate(row):
            if score is not None:
                colour = "black" if score > 0.45 else "white"
                ax.text(j, i, f"{score:.2f}", ha="center", va="center", color=colour, fontsize=7)
    ax.grid(False)
    ax.set_title(shorten(label), fontsize=8)
    ax.set_xticks(range(len(grid.lengths)), grid.lengths, fontsize=7, rotation=45, ha="right")
    ax.set_yticks(range(len(grid.depths)), grid.depths, fontsize=7)
    ax.set_xlabel("length", fontsize=8)
    ax.set_ylabel("depth", fontsize=8)


def _title(figure: Figure, panel: Panel) -> None:
    figure.suptitle(f"{panel.title}\n{'; '.join(panel.notes)}", fontsize=8)


def _save(figure: Figure, path: Path, form: str) -> Path:
    """Write a picture atomically."""
    data = io.BytesIO()
    # A date would make the same results another picture.
    metadata = {"Date": None} if form == "svg" else {}
    figure.savefig(data, format=form, dpi=200 if form == "png" else "figure", metadata=metadata)
    with replacing(path) as partial:
        partial.write_bytes(data.getvalue())
    return path
