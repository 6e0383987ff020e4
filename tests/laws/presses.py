"""Every press and wrapper, at a ratio and with windows that fit short texts."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import floor

import cachepress as cp
from cachepress.presses.base import BasePress, ScorerPress, WrapperPress, all_presses

SMALL = {
    cp.ExpectedAttentionPress: {"n_future_positions": 32},
    cp.KVgradPress: {"layerwise": True, "chunk_size": 16},
    cp.KVzipPress: {"layerwise": True, "chunk_size": 16},
    cp.SnapKVPress: {"window_size": 6},
}
RATIO = 0.5
LAYERS, HEADS = 4, 2


def every_scorer(ratio: float) -> list[ScorerPress]:
    """One of each scorer that the package defines, with the same count in every layer."""
    kinds = {k for k in all_presses(ScorerPress) if k.__module__.startswith("cachepress.")}
    kinds = sorted({k for k in kinds if k.alias} - {cp.PyramidKVPress}, key=name_of)
    return [k(compression_ratio=ratio, **SMALL.get(k, {})) for k in kinds]


def every_press(ratio: float) -> list[ScorerPress]:
    """Those of them with the same count in every head, which need to be told nothing."""
    scorers = every_scorer(ratio)
    return [p for p in scorers if p.budget.scope == "head" and not p.needs.question]


def name_of(press: object) -> str:
    return getattr(press, "__name__", type(press).__name__)


@dataclass(frozen=True)
class Wrapper:
    """A way to wrap a scorer, and what it promises.

    Attributes:
        build: makes the press from a scorer and a ratio.
        counts: rows of a head in each layer, on average where heads compete, for ``n`` tokens.
        scope: who competes; None for those who do under the scorer.
        online: whether chunks end at the same counts as one go.
    """

    build: Callable[[ScorerPress, float], BasePress]
    counts: Callable[[int], list[int]] = lambda n: [max(1, floor(n * RATIO))] * LAYERS
    scope: str | None = None
    online: bool = True


def _layer_ratios(ratio: float) -> list[float]:
    return [ratio / 2, ratio, ratio, ratio * 1.5]


TARGET = 9
WRAPPERS: dict[str, Wrapper] = {
    "none": Wrapper(lambda p, r: p),
    "AdaKVPress": Wrapper(lambda p, r: cp.AdaKVPress(p), scope="layer"),
    "AdaKVPress-model": Wrapper(lambda p, r: cp.AdaKVPress(p, scope="model"), scope="model"),
    "CriticalKVPress": Wrapper(lambda p, r: cp.CriticalKVPress(p)),
    "CriticalAdaKVPress": Wrapper(lambda p, r: cp.CriticalAdaKVPress(p), scope="layer"),
    "PerLayerCompressionPress": Wrapper(
        lambda p, r: cp.PerLayerCompressionPress(p, _layer_ratios(r)),
        counts=lambda n: [floor(n * (1 - x)) or 1 for x in _layer_ratios(RATIO)],
    ),
    "KeyRerotationPress": Wrapper(lambda p, r: cp.KeyRerotationPress(p)),
    "ComposedPress": Wrapper(
        lambda p, r: cp.ComposedPress([cp.KnormPress(r), p]),
        counts=lambda n: [max(1, floor(max(1, floor(n * RATIO)) * RATIO))] * LAYERS,
    ),
    "ChunkPress": Wrapper(lambda p, r: cp.ChunkPress(p, chunk_length=10)),
    "BlockPress": Wrapper(lambda p, r: cp.BlockPress(p, block_size=10)),
    "DecodingPress": Wrapper(
        lambda p, r: cp.DecodingPress(p, 8, TARGET if r else 10**6),
        counts=lambda n: [min(n, TARGET)] * LAYERS,
    ),
    "CompressionRatioDecodingPress": Wrapper(
        lambda p, r: cp.CompressionRatioDecodingPress(p, 8, r)
    ),
    "PrefillDecodingPress": Wrapper(
        lambda p, r: cp.PrefillDecodingPress(p, cp.DecodingPress(cp.KnormPress(), 8, 10**6))
    ),
}
NEEDS_QUERIES = (
    "ExpectedAttentionPress",
    "FinchPress",
    "ObservedAttentionPress",
    "SnapKVPress",
    "TOVAPress",
)
REPLAYS = ("KVgradPress", "KVzipPress")
DECODES = ("DecodingPress", "CompressionRatioDecodingPress")
UNSUPPORTED = {(name, "BlockPress") for name in NEEDS_QUERIES} | set(product(REPLAYS, DECODES))
"""Pairs of a scorer and a wrapper that are refused when they are built."""


def every_wrapper() -> set[str]:
    """The wrappers that the package defines."""
    kinds = {k for k in all_presses() if k.__module__.startswith("cachepress.")}
    kinds -= {*all_presses(ScorerPress), ScorerPress, WrapperPress}
    return {k.__name__ for k in kinds if not k.__name__.startswith("_")}
