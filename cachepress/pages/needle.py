"""Scores by length and depth, for data that hides something in a text."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from cachepress.pages.cells import Run
from cachepress.pages.panels import finite

MOST_VALUES = 12
"""More different depths or lengths than this are put together."""
BINS = 10


@dataclass(frozen=True)
class Needle:
    """Mean scores of a cell, a row for each depth and a column for each length.

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


def needle_of(cell: Run) -> Needle | None:
    """Mean scores by length and depth; None where samples have neither."""
    table = cell.predictions.dropna(subset=["length", "depth", "score"])
    if table.empty:
        return None
    most = 1.0 if table["depth"].max() <= 1 else 100.0
    lengths = _grouped(table["length"], table["length"].min(), table["length"].max())
    depths = _grouped(table["depth"], 0.0, most)
    groups = table["score"].groupby([depths, lengths], observed=False)
    means, counts = groups.mean().unstack(), groups.size().unstack(fill_value=0)
    return Needle(
        lengths=[str(name) for name in means.columns],
        depths=[str(name) for name in means.index],
        scores=[[finite(x) for x in row] for row in means.to_numpy().tolist()],
        counts=counts.to_numpy().tolist(),
    )


def _grouped(values: pd.Series, low: float, high: float) -> pd.Series:
    """Names for the values in their order, of ranges where there are too many values."""
    different = sorted(set(values))
    if len(different) <= MOST_VALUES:
        names = [f"{value:g}" for value in different]
        return values.map(dict(zip(different, names, strict=True))).astype(
            pd.CategoricalDtype(names, ordered=True)
        )
    edges = np.linspace(low, high, BINS + 1)
    names = [f"{a:.3g} to {b:.3g}" for a, b in pairwise(edges)]
    return pd.cut(values, edges, labels=names, include_lowest=True)
