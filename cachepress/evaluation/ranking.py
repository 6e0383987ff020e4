"""Ranks the presses of a sweep by their scores at equal bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from cachepress.evaluation.runner import Result

EQUAL = 1.15
"""Bytes that count as equal: pages that are not full, and positions, come on top of tokens."""


@dataclass(frozen=True)
class Ranked:
    """Press in a ranking, with the result that counts at each ratio.

    Attributes:
        press: its name.
        results: what counts at each ratio; None where it never kept so few bytes.
    """

    press: str
    results: list[Result | None]

    @property
    def _found(self) -> list[Result]:
        return [result for result in self.results if result is not None]

    @property
    def score(self) -> float | None:
        """Mean score over ratios; None where nothing counts."""
        scores = [result.metrics.score.mean for result in self._found if result.metrics.score]
        return fmean(scores) if scores else None

    @property
    def kl(self) -> float | None:
        """Mean divergence over ratios; None where it was not measured at each of them."""
        kls = [result.metrics.kl.mean for result in self._found if result.metrics.kl]
        return fmean(kls) if kls and len(kls) == len(self._found) else None

    @property
    def kept(self) -> float | None:
        """Mean share of the bytes that are kept; None where nothing counts."""
        every = [result.metrics for result in self._found]
        return fmean(m.cache_bytes_after / m.cache_bytes_before for m in every) if every else None

    @property
    def place(self) -> tuple[int, float, float]:
        """Sort key: ratios without a result, mean score, mean divergence."""
        # One that was not measured comes last of equals.
        kl = float("inf") if self.kl is None else self.kl
        return len(self.results) - len(self._found), -(self.score or 0.0), kl


def ranked(results: Sequence[Result]) -> tuple[list[float], list[Ranked]]:
    """Rank the presses that were scored at every ratio, the best one first.

    Presses are compared at equal bytes: what counts at a ratio is the score of the run with the
    most bytes that keeps no more than the ratio leaves of what no press allocates. Those that never
    keep so little come last.

    Args:
        results: of one group.

    Returns:
        The ratios, none if nothing was scored or at fewer than two of them; and the presses.
    """
    rated = [r for r in results if r.run.config.compression_ratio is not None]
    ratios = sorted({result.run.config.ratio for result in rated})
    if len(ratios) < 2 or any(result.metrics.score is None for result in rated):
        return [], []
    presses: dict[str, list[Result]] = {}
    for result in sorted(rated, key=lambda result: result.run.config.ratio):
        presses.setdefault(result.run.config.press_name, []).append(result)
    base = next((r for r in results if r.run.press is None), None)
    lines = [
        Ranked(name, [_fitting(some, ratio, base) for ratio in ratios])
        for name, some in presses.items()
        if len(some) == len(ratios)
    ]
    return ratios, sorted(lines, key=lambda line: line.place)


def _fitting(results: Sequence[Result], ratio: float, base: Result | None) -> Result | None:
    """Find the largest run among those within a ratio's bytes; None if there is none."""

    def kept(result: Result) -> float:
        own = result.metrics
        whole = own.cache_bytes_before if base is None else base.metrics.cache_bytes_after
        return own.cache_bytes_after / whole

    small = [result for result in results if kept(result) <= (1 - ratio) * EQUAL]
    return max(small, key=kept, default=None)
