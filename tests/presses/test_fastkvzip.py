"""Fast KVzip against its gate written out, and what it pins."""

from dataclasses import replace
from math import exp

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.artefacts.kept import save_artefact
from cachepress.cache.batch import compressed_layers
from cachepress.presses.fastkvzip import FastKVzipPress
from cachepress.ranks import pinned
from tests.bounds import close
from tests.presses.test_kvzap import hidden_states_of
from tests.presses.test_snapkv import (
    assert_each_text_is_as_if_alone,
    assert_second_turns_are_as_if_alone,
    recording,
)
from tests.test_budgets import view as table
from tests.tiny import exact_tiny as tiny
from tests.tiny import rand, tokens
from tests.tiny_cache import forward, kept, pressed

D, BASE = 3, 6
SHAPES = {
    "q_weight": (4 * D, 32),
    "q_bias": (4 * D,),
    "k_weight": (2 * D, 32),
    "q_norm": (D,),
    "k_norm": (D,),
    "base": (2, BASE, D),
    "bias": (2, 2),
}


def learned():
    generator = torch.Generator().manual_seed(6)
    return {name: torch.randn(4, *s, generator=generator) for name, s in SHAPES.items()}


GATES = learned()


@pytest.fixture(scope="module")
def gates(tmp_path_factory):
    path = tmp_path_factory.mktemp("gates") / "fastkvzip.safetensors"
    save_artefact(path, "fastkvzip", GATES, {})
    return str(path)


def normed(x, weight):
    size = (sum(a * a for a in x) / len(x) + 1e-6) ** 0.5
    return [a / size * w for a, w in zip(x, weight, strict=True)]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def transcription(depth, hidden):
    """What the gate says of one hidden state, a number for each KV head."""
    w = {name: x[depth].tolist() for name, x in GATES.items()}
    found = []
    for h in range(2):
        key = normed([dot(row, hidden) for row in w["k_weight"][h * D : h * D + D]], w["k_norm"])
        parts = []
        for g in range(2):
            rows = range((2 * h + g) * D, (2 * h + g + 1) * D)
            query = [dot(w["q_weight"][i], hidden) + w["q_bias"][i] for i in rows]
            query = normed(query, w["q_norm"])
            own = exp(dot(query, key) / D**0.5 + w["bias"][h][g])
            others = sum(exp(dot(query, base) / D**0.5) for base in w["base"][h])
            parts.append(own / (own + others))
        found.append(sum(parts) / 2)
    return found


def test_predictions_are_those_of_the_gate(gates):
    model = tiny()
    hidden = hidden_states_of(model)
    press, seen = recording(FastKVzipPress(0.5, n_sink=0, gates=gates))
    pressed(model, press, tokens(30))
    for depth in range(4):
        [(view, score)] = seen[depth]
        wanted = [transcription(depth, state) for state in hidden[depth]]
        wanted = torch.tensor(wanted, dtype=torch.float64).mT
        close(press.token_state(view)[0], wanted)
        close(score[0, :, :-1], wanted[:, :-1])
        assert pinned(score)[0, :, -1].all()
        assert 0 < wanted.min() < wanted.max() < 1


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_best_pairs_of_the_model_or_of_each_layer_stay(gates, layerwise):
    press, seen = recording(FastKVzipPress(0.6, layerwise, window_ratio=0.1, gates=gates))
    cache = pressed(tiny(), press, tokens(30))
    scores = torch.cat([seen[depth][0][1][0] for depth in range(4)])  # [8, 30]
    assert pinned(scores).tolist() == [[True] * 4 + [False] * 23 + [True] * 3] * 8
    held = [head for layer in kept(cache) for head in layer[0]]
    groups = [range(2 * i, 2 * i + 2) for i in range(4)] if layerwise else [range(8)]
    for group in groups:
        rows = [(h, t) for h in group for t in range(30)]
        best = sorted(rows, key=lambda row: -scores[row])[: 12 * len(group)]
        for h in group:
            assert held[h] == sorted(t for head, t in best if head == h)
    assert sum(int(store.lengths.sum()) for store in compressed_layers(cache)) == 8 * 12


@pytest.mark.parametrize("mode", ["exact", "online"])
def test_chunks_score_their_pairs_when_they_are_read(gates, mode):
    model = tiny()
    hidden = hidden_states_of(model)
    inner = FastKVzipPress(0.5, True, n_sink=0, window_ratio=0.0, gates=gates)
    press, seen = recording(inner)
    cache = cp.prefill(model, tokens(30), press, chunk_size=11, mode=mode)
    assert_carried(inner, seen, hidden)
    assert len(seen[0]) == (1 if mode == "exact" else 3)
    if mode == "exact":
        assert kept(cache) == kept(cp.prefill(tiny(), tokens(30), inner))


def assert_carried(press, seen, hidden):
    """Every pair of every view, of this turn or of before, against the gate written out."""
    for depth in range(4):
        wanted = [transcription(depth, state) for state in hidden[depth]]
        wanted = torch.tensor(wanted, dtype=torch.float64)
        for view, _ in seen[depth]:
            found = press.token_state(view)
            for h in range(2):
                valid = view.valid[0, h]
                rows = view.positions[0, h][valid].tolist()
                ours = found[0, h][valid]
                close(ours, wanted[rows, h])


def test_decoded_pairs_are_scored_and_old_ones_keep_their_scores(gates):
    model, cache = tiny(), DynamicCache()
    hidden = hidden_states_of(model)
    inner = FastKVzipPress(gates=gates)
    press, seen = recording(inner)
    with cp.DecodingPress(replace(press, layerwise=True), 3, 10)(model):
        forward(model, cache, input_ids=tokens(20))
        for i in range(6):
            forward(model, cache, input_ids=tokens(1, seed=i))
    assert len(seen[3]) == 3
    assert_carried(inner, seen, hidden)
    assert seen[3][2][0].positions.max() == 25


def test_padding_changes_nothing(gates):
    for layerwise in (False, True):
        press = FastKVzipPress(0.5, layerwise, gates=gates)
        assert_each_text_is_as_if_alone(press)
        assert_second_turns_are_as_if_alone(press)


@pytest.mark.parametrize(
    ("n", "pad", "window"),
    [
        (10, 0, 1),
        (99, 0, 1),
        (100, 0, 2),
        (103, 4, 1),
        (150, 0, 3),
        (31999, 0, 639),
        (32000, 0, 7),
        (32001, 2, 639),
    ],
)
def test_the_window_is_a_fraction_of_short_texts_and_fixed_in_long_ones(n, pad, window):
    view = replace(table(n, 5, pad), hidden_feature=rand(1, 1, n))
    score = FastKVzipPress(0.5, n_sink=2, window_size=7).score(view)
    rows = pinned(score)[0, 0].nonzero().flatten().tolist()
    assert [t for t in rows if t >= pad] == [pad, pad + 1, *range(n - window, n)]
    assert torch.equal(score[~pinned(score)], view.hidden_feature[~pinned(score)])


def test_the_window_is_the_floor_of_the_decimal_fraction():
    press = FastKVzipPress(0.5, n_sink=0, window_ratio=0.07)
    for n in range(1, 400):
        view = replace(table(n, 5), hidden_feature=torch.zeros(1, 1, n))
        assert int(pinned(press.score(view)).sum()) == max(1, 7 * n // 100), n


def test_of_few_pairs_the_sinks_stay_first(gates):
    press = FastKVzipPress(n_kept=6, n_sink=4, window_ratio=0.5, layerwise=True, gates=gates)
    for layer in kept(pressed(tiny(), press, tokens(30))):
        assert [head[:4] for head in layer[0]] == [[0, 1, 2, 3]] * 2
        rest = [t for head in layer[0] for t in head[4:]]
        assert len(rest) == 4 and min(rest) >= 15


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"bias": None}, "whole fastkvzip artefact: bias is missing"),
        ({"q_bias": None}, "q_bias is missing"),
        ({"base": None}, "base is missing"),
        ({"q_norm": None}, "q_norm is missing"),
        ({"k_norm": torch.zeros(4, 5)}, "k_norm is [(]4, 5[)], wanted [(]4, 3[)]"),
        ({"base": torch.zeros(4, 2, 6, 4)}, "base is [(]4, 2, 6, 4[)], wanted [(]4, 2, 8, 3[)]"),
        ({"q_weight": torch.zeros(4, 12, 31)}, "q_weight is [(]4, 12, 31[)], wanted [(]4, 12, 32"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path, tensors, message):
    model, calls = tiny(), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    path = tmp_path / "fastkvzip.safetensors"
    given = {name: x for name, x in (GATES | tensors).items() if x is not None}
    save_artefact(path, "fastkvzip", given, {})
    with pytest.raises(cp.CachepressError, match=message):
        cp.prefill(model, tokens(9), FastKVzipPress(0.5, gates=str(path)))
    with pytest.raises(cp.CachepressError, match="cachepress train fastkvzip --model"):
        cp.prefill(model, tokens(9), FastKVzipPress(0.5, gates=str(tmp_path / "none")))
    assert not calls


def test_the_spelling_and_bad_options(gates):
    press = FastKVzipPress(0.5, n_sink=2, gates=gates)
    assert cp.parse(repr(press)) == press == press.for_model(tiny())
    for options in ({"n_sink": -1}, {"window_size": 0}, {"window_ratio": 1.5}):
        with pytest.raises(cp.CachepressError, match=next(iter(options))):
            FastKVzipPress(0.5, **options)
    with pytest.raises(TypeError, match="not made ready"):
        FastKVzipPress(0.5).predict(torch.zeros(1, 1, 32), 0)
