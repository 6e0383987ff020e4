"""Scoring takes memory in proportion to its scores, however long the text, and leaves none behind.

A layer is made directly, because a model would take too long to read such texts: few heads, but of
the usual size, in bfloat16, so that a copy of its keys in float32 is far above what is allowed.
"""

import os
from contextlib import nullcontext
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.cache.bytes import allocated_bytes
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.masks import TextMask
from cachepress.cache.pairs import PairBytes, Pairs
from cachepress.cache.snapshot import Snapshot
from cachepress.cache.tail import TailRows
from cachepress.call import AttentionCall, Place
from cachepress.engine import compress, compress_together
from cachepress.hf.rotary import PairRotary
from cachepress.ops import AttentionRule
from cachepress.press import BasePress
from cachepress.query_stats import QueryStats
from cachepress.reconstruction import ReconstructionView
from cachepress.view import Needs
from tests.allocations import Allocations
from tests.bounds import close
from tests.dense import mask_and_positions
from tests.laws.presses import RATIO, UNSUPPORTED, WRAPPERS, every_scorer, name_of
from tests.laws.test_growth import WRAPPED, scorers
from tests.tiny import exact_tiny, tokenizer, tokens
from tests.tiny_cache import forward

HEADS, GROUP, SIZE, HIDDEN = 2, 4, 128, 512
LONG = [(8192, 1), (8192, 4), (65536, 1), (65536, 4)]
TEXTS = LONG if os.environ.get("CACHEPRESS_LAWS") == "all" else [(65536, 1)]
"""Tokens and sequences of a layer; ``make laws`` tries all of them."""
SUMMED = 512
"""Queries whose attention is summed up: those of a last chunk, because all would take too long."""
PIECES = 4
"""How many pieces of the size that is allowed may live at once."""


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "query_stats": {"mean": (1, HEADS * GROUP, SIZE), "covariance": (1, HEADS * GROUP, SIZE, SIZE)},
    "q_filters": {"filters": (1, HEADS, SIZE)},
    "kvzap_mlp": {
        "layers.0.0.weight": (HIDDEN // 2, HIDDEN),
        "layers.0.0.bias": (HIDDEN // 2,),
        "layers.0.2.weight": (HEADS, HIDDEN // 2),
        "layers.0.2.bias": (HEADS,),
    },
    "fastkvzip": {
        "q_weight": (1, HEADS * GROUP * 16, HIDDEN),
        "q_bias": (1, HEADS * GROUP * 16),
        "k_weight": (1, HEADS * 16, HIDDEN),
        "q_norm": (1, 16),
        "k_norm": (1, 16),
        "base": (1, HEADS, 16, 16),
        "bias": (1, HEADS, GROUP),
    },
}
"""What presses learn of a model with one layer, by the kind of artefact."""
LEARNED: dict[type[BasePress], BasePress] = {
    kind: kind(RATIO, **{option: "learned"})
    for kind, option in {
        cp.ExpectedAttentionStatsPress: "stats",
        cp.FastKVzipPress: "gates",
        cp.KVzapPress: "surrogate",
        cp.QFilterPress: "filters",
    }.items()
}
PRESSES: dict[str, BasePress] = {
    "-".join(name_of(x) for x in (press, getattr(press, "press", None)) if x): press
    for press in [*scorers(), *LEARNED.values(), *WRAPPED]
}
PRESSES["BlockPress-KnormPress"] = cp.BlockPress(cp.KnormPress(RATIO), block_size=4096)
RECONSTRUCTING = {
    **{name: press for name, press in PRESSES.items() if press.needs.reconstruction},
    "KVzipPress-plus": cp.KVzipPress(RATIO, kvzip_plus_normalization=True),
}
SCORERS = {name_of(press): press for press in every_scorer(RATIO)}
SCORERS |= {
    "KeyRerotationPress": cp.KeyRerotationPress(cp.KnormPress(RATIO)),
    "CriticalKVPress": cp.CriticalKVPress(cp.KnormPress(RATIO)),
    "ThinKPress": cp.ThinKPress(RATIO),
}
REWRITES = ("KeyRerotationPress", "MergingPress", "CAMPress", "FinchPress")
"""Presses that store keys or values otherwise than the model computed them."""
PRESSES["AdaKVPress-model"] = cp.AdaKVPress(cp.NonCausalAttnPress(RATIO), scope="model")


def allowed(t: int, b: int) -> int:
    """Bytes of the largest piece of memory that law 11 allows."""
    return 8 * b * HEADS * t * 4 + 2**25


def angles(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine as a rotary module of transformers computes them."""
    frequencies = 10000.0 ** -(torch.arange(0, SIZE, 2, device=x.device) / SIZE)
    turned = (positions.unsqueeze(-1).float() * frequencies).repeat(1, 1, 2)
    return turned.cos().to(x.dtype), turned.sin().to(x.dtype)


class Features:
    """What a press may need of a forward of the layer besides attention."""

    def __init__(self, hidden: Tensor | None) -> None:
        self._hidden = hidden

    def rotary(self, call):
        return PairRotary(angles, False, slice(None, SIZE // 2))

    def projection(self, call):
        return _normal(HEADS, GROUP, SIZE, HIDDEN)

    def hidden(self, call):
        return self._hidden


class Store:
    """Stands for the cache layer: what is stored is no part of the scoring."""

    recodes = False

    def __init__(self, pairs: Pairs) -> None:
        tail, (b, _, t, _) = TailRows(pairs.keys, pairs.values), pairs.keys.shape
        self.snapshot, self.kept = Snapshot((), tail, t, b, None), 0

    def pair_bytes(self, pairs, compaction, token_state, pair_bias):
        return PairBytes(0, 0)

    def restore(self):
        raise AssertionError("nothing was to be evicted")

    def keep(self, pairs, mask, text_valid, key_channels, lengths):
        self.kept = int(mask.sum())


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@lru_cache(maxsize=4)
def _half(*shape: int, mean: float = 0.0) -> Tensor:
    return (_normal(*shape) + mean).bfloat16()


def call_of(needs: Needs, t: int, b: int) -> AttentionCall:
    """The call of a forward that read ``t`` tokens, of which the last may be the only queries."""
    n = SUMMED if needs.attention_sums else t
    # Keys with much in common, as real ones have: R-KV searches long for those that are alike.
    keys, values = _half(b, HEADS, t, SIZE, mean=1.5), _half(b, HEADS, t, SIZE)
    query = _half(b, HEADS * GROUP, t, SIZE)[:, :, t - n :]
    hidden = _half(b, t, HIDDEN)[:, t - n :] if needs.hidden else None
    question = torch.full((b,), 32) if needs.question else None
    rope = torch.arange(t - n, t).expand(b, n)
    return AttentionCall(
        module=nn.Identity(),
        key=None,
        query=query,
        output=query[:, :, :0].transpose(1, 2),
        mask=TextMask(None, n),
        rule=AttentionRule(SIZE**-0.5),
        place=Place(0, 0, 1, rope, question),
        features=Features(hidden),
        read=Pairs(keys, values),
    )


def scored(press: BasePress, t: int, b: int) -> Allocations:
    """What it takes to observe a layer, to score its pairs and to choose those that are kept."""
    call = call_of(press.needs, t, b)
    store, stats, found = Store(call.pairs), QueryStats(press.needs.observed, t), Allocations()
    with found, torch.no_grad():
        stats.add(call)
        waiting = compress(press, store, call, stats)
        if waiting is not None:
            compress_together(press, [waiting])
    assert 0 < store.kept <= b * HEADS * t
    return found


@pytest.fixture
def _learned(monkeypatch):
    """Random numbers in the place of what was learned of a model."""

    def load(path: str, kind: str, *_: object) -> dict[str, Tensor]:
        return {name: _normal(*shape) for name, shape in SHAPES[kind].items()}

    for name in ("expected_attention_stats", "fastkvzip", "kvzap", "qfilter"):
        monkeypatch.setattr(f"cachepress.presses.{name}.load_artefact", load)


@pytest.mark.usefixtures("_learned")
@pytest.mark.parametrize(("t", "b"), TEXTS)
@pytest.mark.parametrize("name", PRESSES)
def test_scoring_takes_memory_in_proportion_to_its_scores(name, t, b):
    found, most = scored(PRESSES[name], t, b), allowed(t, b)
    # Keys that were rotated anew, and values that others were merged into, are what is stored.
    result = 2 * b * HEADS * t * SIZE if name.split("-")[0] in REWRITES else 0
    assert found.largest <= max(most, result), found.maker
    assert found.peak <= PIECES * most + 2 * result


@pytest.mark.parametrize("name", RECONSTRUCTING)
def test_so_do_the_scores_of_a_repeated_chunk(name):
    press, t, found = RECONSTRUCTING[name], TEXTS[-1][0], Allocations()
    reconstruction = press.needs.reconstruction
    n = SUMMED // 4 if reconstruction.whole else reconstruction.chunk_size
    pairs = 2 * t if reconstruction.whole else reconstruction.n_sink + 2 * n
    chunk = slice(0, t) if reconstruction.whole else slice(pairs - 2 * n, pairs - n)
    view = ReconstructionView(
        queries=_half(1, HEADS, GROUP, n, SIZE),
        keys=_half(1, HEADS, pairs, SIZE),
        values=_half(1, HEADS, pairs, SIZE),
        valid=torch.ones(1, HEADS, pairs, dtype=torch.bool),
        chunk=chunk,
        rule=AttentionRule(SIZE**-0.5),
        projection=_half(HEADS, GROUP, SIZE, HIDDEN),
        hidden=_half(1, n, HIDDEN),
        gradient=_normal(1, n).abs(),
    )
    with found, torch.no_grad():
        scores = press.reconstructed(view)
    assert scores.shape[0] == HEADS and bool(scores.isfinite().all())
    assert found.largest <= allowed(t, 1), found.maker
    assert found.peak <= PIECES * allowed(t, 1)


@pytest.mark.parametrize("name", SCORERS)
def test_blocks_change_no_score(name, monkeypatch):
    """Nor a key that is stored: a text may be one block or many, with padding and in turns."""
    press, kind = SCORERS[name], type(SCORERS[name])
    score, found = kind.score, []

    def recording(self, view):
        found.append(score(self, view))
        return found[-1]

    def run():
        cache, mask = DynamicCache(), torch.ones(2, 60, dtype=torch.long)
        mask[1, :17] = 0
        model, ids = exact_tiny(), tokens(60, batch=2)
        with press(model, question=3, tokenizer=tokenizer()):
            for start, stop in ((0, 40), (40, 60)):
                inputs = mask_and_positions(mask[:, :stop], start, stop - start)
                forward(model, cache, input_ids=ids[:, start:stop], **inputs)
        return [x.snapshot.rows().keys for x in compressed_layers(cache)]

    monkeypatch.setattr(kind, "score", recording)
    once = [*run(), *found]
    found.clear()
    monkeypatch.setattr("cachepress.ops.blockwise.AT_ONCE", 50)
    for ours, wanted in zip([*run(), *found], once, strict=True):
        close(ours.double(), wanted.double())  # Positions and seeded numbers are float32.
    assert len(found) == 8


PROMPT, SMALL = 500, 1024
SNAP, SIMPLE = "SnapKVPress", "KeyDiffPress"
OBSERVED = {
    **{name: press for name, press in SCORERS.items() if not press.needs.reconstruction},
    **RECONSTRUCTING,
    **{
        name: wrapper.build(SCORERS[SIMPLE if (SNAP, name) in UNSUPPORTED else SNAP], RATIO)
        for name, wrapper in WRAPPERS.items()
    },
    "NonCausal-model": cp.AdaKVPress(cp.NonCausalAttnPress(RATIO), scope="model"),
    "Critical-model": cp.AdaKVPress(cp.CriticalKVPress(cp.SnapKVPress(RATIO)), scope="model"),
    "Expected-model": cp.AdaKVPress(cp.ExpectedAttentionPress(RATIO), scope="model"),
}


def left_over(press: BasePress | None) -> list[int]:
    """Bytes beside the cache that live when each of the layers begins, and after the forward."""
    model, cache, found, left = exact_tiny(), DynamicCache(), Allocations(), []

    def measure(*_: object) -> None:
        tensors = [x for layer in cache.layers if layer.is_initialized for x in pairs_of(layer)]
        left.append(found.living() - allocated_bytes(tensors))

    for layer in model.model.layers:
        layer.register_forward_pre_hook(measure)
    inside = nullcontext() if press is None else press(model, question=3, tokenizer=tokenizer())
    with inside:
        left.clear()  # Some presses have run the model by now.
        with found:
            forward(model, cache, input_ids=tokens(PROMPT))
            measure()
    return [*left[:4], left[-1]]


def pairs_of(layer: object) -> list[Tensor]:
    if isinstance(layer, CompressedLayer):
        return layer.tensors()
    return [layer.keys, layer.values]


@pytest.mark.counts
@pytest.mark.parametrize("name", OBSERVED)
def test_nothing_of_a_layer_outlives_its_compression(name):
    """Layers that are compressed together keep their scores until then, and no copy of a pair."""
    press = OBSERVED[name]
    ours, plain = left_over(press), left_over(None)
    together = press.budget.scope == "model" or press.needs.reconstruction is not None
    more = 4 * HEADS * PROMPT * 8 if together else SMALL
    for i in (1, 2):
        assert ours[i + 1] - ours[i] <= plain[i + 1] - plain[i] + more
    assert ours[-1] <= plain[-1] + SMALL
