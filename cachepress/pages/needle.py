"""Averages scores by context length and needle depth, for needle-in-a-haystack data."""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np

from cachepress.evaluation.statistics import finite
from cachepress.pages.saved import SavedRun

MOST_VALUES = 12
"""More different depths or lengths than this are put together."""
BINS = 10


@dataclass(frozen=True)
class Needle:
    """Mean scores of a run by needle depth (rows) and context length (columns).

    Attributes:
        lengths: names of the columns.
        depths: names of the rows.
        scores: means; None where there is no sample.
        counts: samples of each mean.
    """

    lengths: list[str]
    depths: list[str]
    scores: list[list[float | None]]
    counts: list[list[int]]


def needle_of(run: SavedRun) -> Needle | None:
    """Average a run's scores by length and depth; None if samples have neither."""
    table = run.predictions.dropna(subset=["length", "depth", "score"])
    if table.empty:
        return None
    lengths, depths, scores = (list(table[name]) for name in ("length", "depth", "score"))
    columns, across = _grouped(lengths, min(lengths), max(lengths))
    rows, down = _grouped(depths, 0.0, 1.0 if max(depths) <= 1 else 100.0)
    grid: list[list[list[float]]] = [[[] for _ in columns] for _ in rows]
    for score, row, column in zip(scores, down, across, strict=True):
        if 0 <= row < len(rows):  # A depth may be none.
            grid[row][column].append(score)
    return Needle(
        lengths=columns,
        depths=rows,
        scores=[[finite(fmean(some)) if some else None for some in line] for line in grid],
        counts=[[len(some) for some in line] for line in grid],
    )


def _grouped(values: list[float], low: float, high: float) -> tuple[list[str], list[int]]:
    """Group values, by ranges if there are too many: the groups' names, and each value's group."""
    different = sorted(set(values))
    if len(different) <= MOST_VALUES:
        return [f"{value:g}" for value in different], [different.index(x) for x in values]
    edges = np.linspace(low, high, BINS + 1).tolist()
    names = [f"{a:.3g} to {b:.3g}" for a, b in pairwise(edges)]
    return names, [max(bisect_left(edges, x), x == low) - 1 for x in values]
