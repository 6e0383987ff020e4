"""Every press and wrapper, at a ratio and with windows that fit short texts."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import floor

import cachepress as cp
from cachepress.press import BasePress, ScorerPress, WrapperPress, all_presses
from tests.learned import learned

SOURCES = {
    cp.ExpectedAttentionStatsPress: "stats",
    cp.FastKVzipPress: "gates",
    cp.KVzapPress: "surrogate",
    cp.QFilterPress: "filters",
}
"""The option that says where a press finds what it has to know of a model."""
SMALL = {
    cp.CURPress: {"local_window_size": 4},
    cp.CapPress: {"n_future_positions": 32},
    cp.CompactorPress: {
        "sink_size_start": 2,
        "sink_size_end": 2,
        "chunk_size": 8,
        "sketch_dimension": 6,
    },
    cp.DefensiveKVPress: {"window_size": 6},
    cp.ExpectedAttentionPress: {"n_future_positions": 32},
    cp.ExpectedAttentionStatsPress: {"n_future_positions": 32},
    cp.FastKVzipPress: {"layerwise": True},
    cp.KVgradPress: {"layerwise": True, "chunk_size": 16},
    cp.KVzipPress: {"layerwise": True, "chunk_size": 16},
    cp.LagKVPress: {"lag_size": 6},
    cp.LeverageScorePress: {"sketch_dimension": 6},
    cp.NonCausalAttnPress: {"chunk_size": 8},
    cp.RKVPress: {"window_size": 4},
    cp.SnapKVPress: {"window_size": 6},
    cp.TriAttentionPress: {"window_size": 4, "max_distance": 64},
}
RATIO = 0.5
LAYERS, HEADS = 4, 2


def every_scorer(ratio: float, name: str = "llama") -> list[ScorerPress]:
    """One of each scorer that the package defines, with the same count in every layer.

    Args:
        ratio: of all.
        name: the architecture that they are for, where they have to know the model.
    """
    kinds = {k for k in all_presses(ScorerPress) if k.__module__.startswith("cachepress.")}
    kinds = sorted(
        {k for k in kinds if k.alias} - {cp.PyramidKVPress, cp.KVComposePress}, key=name_of
    )
    sources = {k: {SOURCES[k]: learned(name)} for k in kinds if k in SOURCES}
    return [k(ratio, **SMALL.get(k, {}), **sources.get(k, {})) for k in kinds]


def every_press(ratio: float) -> list[ScorerPress]:
    """Those of them with the same count in every head, for any model, told nothing."""
    scorers = [p for p in every_scorer(ratio) if type(p) not in SOURCES]
    return [p for p in scorers if p.budget.scope == "head" and not p.needs.question]


def name_of(press: object) -> str:
    return getattr(press, "__name__", type(press).__name__)


@dataclass(frozen=True)
class Wrapper:
    """A way to wrap a scorer, and what it promises.

    Attributes:
        build: makes the press from a scorer and a ratio.
        counts: pairs of a head in each layer, on average where heads compete, for ``n`` tokens;
            None where that depends on the text.
        scope: who competes; None for those who do under the scorer.
        keys: whether kept keys are those of the text, but for rotation.
        values: whether kept values are.
        channels: channels of the keys that are stored, of 8.
        stores: whether it says itself how pairs are stored.
    """

    build: Callable[[ScorerPress, float], BasePress]
    counts: Callable[[int], list[int]] | None = lambda n: [max(1, floor(n * RATIO))] * LAYERS
    scope: str | None = None
    keys: bool = True
    values: bool = True
    channels: int = 8
    stores: bool = False


def _layer_ratios(ratio: float) -> list[float]:
    return [ratio / 2, ratio, ratio, ratio * 1.5]


TARGET = 9
HEAD_SCORES = ((0.1, 0.9), (0.5, 0.2), (0.0, 0.3), (0.8, 0.4))
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
    "CAMPress": Wrapper(
        lambda p, r: cp.CAMPress(p, 8, TARGET if r else 10**6),
        counts=lambda n: [min(n, TARGET)] * LAYERS,
        values=False,
    ),
    "ChunkKVPress": Wrapper(lambda p, r: cp.ChunkKVPress(p, chunk_length=5)),
    "DMSPress": Wrapper(
        # The inner ratio does not count, but at 0 a reconstruction would be left out.
        lambda p, r: cp.DMSPress(p.with_ratio(RATIO), 0.0 if r else -1e30, 8),
        counts=None,
    ),
    "DuoAttentionPress": Wrapper(
        lambda p, r: cp.DuoAttentionPress(r, HEAD_SCORES, sink_size=2, recent_size=6), counts=None
    ),
    "HeadKVPress": Wrapper(lambda p, r: cp.HeadKVPress(p, HEAD_SCORES), scope="model"),
    "KVComposePress": Wrapper(lambda p, r: cp.KVComposePress(r), scope="model"),
    "EntropyGatedChunkKVPress": Wrapper(lambda p, r: cp.EntropyGatedChunkKVPress(p, 6, 2)),
    "KIVIPress": Wrapper(
        lambda p, r: cp.KIVIPress(p, residual=5), keys=False, values=False, stores=True
    ),
    "LUKVPress": Wrapper(lambda p, r: cp.LUKVPress(p, curve=learned()), scope="model"),
    "MergingPress": Wrapper(lambda p, r: cp.MergingPress(p), values=False),
    "QuestPress": Wrapper(lambda p, r: cp.QuestPress(p, pages=1 if r else 99)),
    "SimLayerKVPress": Wrapper(
        lambda p, r: cp.SimLayerKVPress(0.1 if r else 1.0, n_recent=8), counts=None
    ),
    "ThinKPress": Wrapper(
        lambda p, r: cp.ComposedPress([cp.ThinKPress(r, window_size=6), p]), keys=False, channels=4
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
    "CapPress",
    "FastKVzipPress",
    "KVzapPress",
    "CompactorPress",
    "DefensiveKVPress",
    "H2OPress",
    "NonCausalAttnPress",
    "RKVPress",
    "TriAttentionPress",
    "ExpectedAttentionPress",
    "FinchPress",
    "ObservedAttentionPress",
    "SnapKVPress",
    "TOVAPress",
)
REPLAYS = ("KVgradPress", "KVzipPress")
DECODES = ("CAMPress", "DecodingPress", "CompressionRatioDecodingPress")
UNSUPPORTED = {(name, "BlockPress") for name in NEEDS_QUERIES} | set(product(REPLAYS, DECODES))
"""Pairs of a scorer and a wrapper that are refused when they are built."""


def every_wrapper() -> set[str]:
    """The wrappers that the package defines."""
    kinds = {k for k in all_presses() if k.__module__.startswith("cachepress.")}
    kinds -= {*all_presses(ScorerPress), ScorerPress, WrapperPress}
    return {k.__name__ for k in kinds if not k.__name__.startswith("_")}
