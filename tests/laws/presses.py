"""Every press, at a ratio and with windows that fit short texts."""

import cachepress as cp
from cachepress.presses.base import ScorerPress, all_presses

SMALL = {cp.SnapKVPress: {"window_size": 6}, cp.ExpectedAttentionPress: {"n_future_positions": 32}}


def every_press(ratio: float) -> list[ScorerPress]:
    """One of each scorer that the package defines, with the same count in every layer."""
    kinds = {k for k in all_presses(ScorerPress) if k.__module__.startswith("cachepress.")}
    kinds = sorted(kinds - {cp.PyramidKVPress}, key=name_of)
    return [k(compression_ratio=ratio, **SMALL.get(k, {})) for k in kinds]


def name_of(press: object) -> str:
    return getattr(press, "__name__", type(press).__name__)
