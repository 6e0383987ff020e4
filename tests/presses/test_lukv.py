"""LU-KV: how many pairs each head has, and which."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.artefacts.kept import save_artefact
from cachepress.budgets import Ratio
from cachepress.cache.batch import compressed_layers
from cachepress.presses.lukv import LUKVPress
from cachepress.ranks import pinned
from cachepress.train import budget_curve
from tests.presses.test_snapkv import assert_each_text_is_as_if_alone, recording, two_turns
from tests.test_budgets import plain_shares
from tests.tiny import exact_tiny as tiny
from tests.tiny import tiny as single
from tests.tiny import tokens
from tests.tiny_cache import forward, kept, pressed


def curve_of(seed):
    """The curve of heads whose pairs are worth less and less, each at a pace of its own."""
    pace = 0.5 + 3 * torch.rand(4, 2, 1, generator=torch.Generator().manual_seed(seed))
    return budget_curve((-torch.arange(100) / 100 * pace).exp())


CURVE, SKEWED = curve_of(1), curve_of(2)
SNAP = cp.SnapKVPress(0.5, window_size=4)


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    path = tmp_path_factory.mktemp("curve") / "lukv.safetensors"
    save_artefact(path, "lukv", {"lukv": SKEWED}, {})
    return str(path)


def counts(cache, row=0):
    return [store.lengths[row].tolist() for store in compressed_layers(cache)]


def plain_counts(curve, n, seen):
    """Pairs of each head, ``n`` on average: between two ratios, in proportion, whole numbers."""
    curve = [[1.0] * 8, *curve.flatten(1).double().tolist(), [0.0] * 8]
    place = 100 * (1 - Fraction(n, seen))
    below = min(floor(place), 99)
    part = place - below
    pairs = zip(curve[below], curve[below + 1], strict=True)
    weights = [Fraction(a) * (1 - part) + Fraction(b) * part for a, b in pairs]
    weights = [max(w, Fraction(1, 10**12)) for w in weights]
    shares = plain_shares(weights, Fraction(max(n, 1) * 8), 1, seen)
    rows = [floor(share + Fraction(1, 10**9)) for share in shares]
    order = sorted(range(8), key=lambda i: (rows[i] - shares[i], i))
    for i in order[: max(n, 1) * 8 - sum(rows)]:
        rows[i] += 1
    return [rows[i : i + 2] for i in range(0, 8, 2)]


@pytest.mark.counts
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.25, 0.333, 0.5, 0.75, 0.9, 0.97])
@pytest.mark.parametrize("learned", [CURVE, SKEWED])
def test_counts_follow_the_curve_and_their_total_is_exact(ratio, learned, tmp_path):
    path = tmp_path / "lukv.safetensors"
    save_artefact(path, "lukv", {"lukv": learned}, {})
    for n in (40, 61):
        press = LUKVPress(cp.KnormPress(ratio), curve=str(path))
        found = counts(pressed(tiny(), press, tokens(n)))
        average = max(1, floor(n * (1 - Fraction(str(ratio)))))
        assert sum(map(sum, found)) == 8 * average
        assert found == plain_counts(learned, average, n)
        assert min(map(min, found)) >= 1 and max(map(max, found)) <= n


@pytest.mark.counts
def test_at_a_ratio_of_the_curve_each_head_has_its_share(curve):
    """100 pairs, so that a hundredth is a pair."""
    found = counts(pressed(tiny(), LUKVPress(cp.KnormPress(0.5), curve=curve), tokens(100)))
    assert found == (100 * SKEWED[49]).round().long().tolist()
    assert min(map(min, found)) > 1
    assert len({n for layer in found for n in layer}) > 4


@pytest.mark.parametrize("inner", [cp.KnormPress(0.75), SNAP])
def test_each_head_keeps_its_best_pairs_the_sinks_and_the_newest(inner, curve):
    press, seen = recording(inner)
    cache = pressed(tiny(), LUKVPress(press, sink=2, window=3, curve=curve), tokens(40))
    for depth, layer in enumerate(kept(cache)):
        [(_, score)] = seen[depth]
        for h, rows in enumerate(layer[0]):
            free = sorted(range(2, 37), key=lambda t: (score[0, h, t], t), reverse=True)
            wanted = [0, 1, 39, 38, 37, *free][: len(rows)]
            assert rows == sorted(wanted)


def test_sinks_and_the_newest_pair_are_pinned(curve):
    press, seen = recording(LUKVPress(cp.KnormPress(0.5), curve=curve))
    pressed(tiny(), press, tokens(20))
    [(_, score)] = seen[1]
    assert pinned(score)[0].tolist() == [[True] * 4 + [False] * 15 + [True]] * 2


def test_a_published_file_says_which_fraction_each_head_evicts(tmp_path, curve):
    np.save(tmp_path / "curve.npy", 1 - SKEWED.double().numpy())
    press = LUKVPress(SNAP, curve=str(tmp_path / "curve.npy"))
    found = counts(pressed(tiny(), press, tokens(40)))
    assert found == counts(pressed(tiny(), LUKVPress(SNAP, curve=curve), tokens(40)))


@pytest.mark.counts
def test_the_head_that_a_published_curve_evicts_most_of_keeps_least(tmp_path):
    drop = np.full((99, 4, 2), 0.2)
    drop[:, 0, 0], drop[:, 3, 1] = 0.36, 0.04
    np.save(tmp_path / "curve.npy", drop)
    press = LUKVPress(cp.KnormPress(0.2), curve=str(tmp_path / "curve.npy"))
    found = counts(pressed(tiny(), press, tokens(100)))
    assert found == [[64, 80], [80, 80], [80, 80], [80, 96]]


def test_a_curve_that_is_written_anew_is_read_anew(tmp_path):
    path = tmp_path / "lukv.safetensors"
    press = LUKVPress(cp.KnormPress(0.5), curve=str(path))
    for learned in (CURVE, SKEWED):
        save_artefact(path, "lukv", {"lukv": learned}, {})
        assert counts(pressed(tiny(), press, tokens(40))) == plain_counts(learned, 20, 40)


def test_padding_changes_nothing_and_each_text_has_its_own_total(curve):
    press = LUKVPress(SNAP, curve=curve)
    assert_each_text_is_as_if_alone(press)
    texts = torch.cat([tokens(31, seed=1), tokens(31, seed=2)])
    mask = torch.ones(2, 31, dtype=torch.long)
    mask[0, :11] = 0
    cache = cp.prefill(tiny(), texts, press, attention_mask=mask)
    assert [counts(cache, row) for row in (0, 1)] == [
        plain_counts(SKEWED, 10, 20),
        plain_counts(SKEWED, 15, 31),
    ]


def test_second_turns_and_chunks_end_at_the_same_counts(curve):
    model, ids, cache = tiny(), tokens(60), DynamicCache()
    press = LUKVPress(SNAP, curve=curve)
    with press(model):
        forward(model, cache, input_ids=ids[:, :25])
        assert counts(cache) == plain_counts(SKEWED, 12, 25)
        forward(model, cache, input_ids=ids[:, 25:])
    assert counts(cache) == plain_counts(SKEWED, 30, 60)
    for mode in ("exact", "online"):
        chunked = cp.prefill(model, ids, press, chunk_size=20, mode=mode)
        assert counts(chunked) == counts(cache)
    first = [tokens(n, seed=n) for n in (31, 18)]
    second = [tokens(n, seed=n) for n in (3, 14)]
    batch, mask = two_turns(model, press, first, second)
    own = mask.cumsum(-1) - 1
    for i in range(2):
        alone, _ = two_turns(model, press, first[i : i + 1], second[i : i + 1])
        for layer, layer_alone in zip(kept(batch), kept(alone), strict=True):
            assert [own[i][head].tolist() for head in layer[i]] == layer_alone[0]


def test_ratio_0_keeps_everything(curve):
    model, ids, cache, plain = tiny(), tokens(40), DynamicCache(), DynamicCache()
    with LUKVPress(cp.KnormPress(0.0), curve=curve)(model):
        ours = forward(model, cache, input_ids=ids).logits
    assert torch.equal(ours, forward(model, plain, input_ids=ids).logits)
    assert counts(cache) == [[40, 40]] * 4


def test_a_short_text_leaves_a_pair_in_each_head(curve):
    found = counts(pressed(tiny(), LUKVPress(cp.KnormPress(0.9), curve=curve), tokens(5)))
    assert found == [[1, 1]] * 4


@pytest.mark.parametrize("wraps", ["inside", "around"])
def test_a_running_generation_is_bound_in_total_by_the_curve(curve, wraps):
    if wraps == "inside":
        press = cp.DecodingPress(LUKVPress(cp.KnormPress(), curve=curve), 4, 10)
    else:
        press = LUKVPress(cp.DecodingPress(cp.KnormPress(), 4, 10), curve=curve)
    model, cache = tiny(), DynamicCache()
    with press(model):
        forward(model, cache, input_ids=tokens(30))
    assert counts(cache) == plain_counts(SKEWED, 10, 30)


def test_a_bound_on_bytes_holds(curve):
    for limit in (60_000, 75_000, 90_123):
        press = LUKVPress(cp.KnormPress(max_bytes=limit), curve=curve)
        cache = pressed(single(), press, tokens(400))
        assert 0.7 * limit < cp.size_of(cache).bytes_after <= limit
        assert len({n for layer in counts(cache) for n in layer}) > 4


def test_what_does_not_fit_is_refused_before_any_work(curve, tmp_path):
    model, calls = tiny(), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    np.save(tmp_path / "short.npy", np.ones((98, 4, 2)))
    for source, message in (
        (str(tmp_path / "none"), "cachepress train lukv --model"),
        (
            str(tmp_path / "short.npy"),
            "is no lukv artefact: it holds an array of float64, [(]98, 4, 2[)]",
        ),
    ):
        with pytest.raises(cp.CachepressError, match=message):
            cp.prefill(model, tokens(9), LUKVPress(SNAP, curve=source))
    with pytest.raises(cp.CachepressError, match="lukv is [(]99, 4, 2[)], wanted [(]99, 4, 4[)]"):
        cp.prefill(tiny("gpt2"), tokens(9), LUKVPress(SNAP, curve=curve))
    assert not calls


def test_the_inner_press_is_made_ready_too(curve, tmp_path):
    with pytest.raises(cp.CachepressError, match="cachepress train q_filters --model"):
        LUKVPress(cp.QFilterPress(0.5, filters=str(tmp_path)), curve=curve).for_model(tiny())


def test_the_spelling_and_bad_options(curve):
    press = LUKVPress(SNAP, sink=2, curve=curve)
    assert cp.parse(repr(press)) == press == press.for_model(tiny())
    assert press.compression_ratio == 0.5 and press.with_ratio(0.25).press.compression_ratio == 0.25
    assert LUKVPress(SNAP).budget.amount == Ratio(0.5)
    for options in ({"sink": -1}, {"window": 1.5}):
        with pytest.raises(cp.CachepressError, match=next(iter(options))):
            LUKVPress(SNAP, **options)
    for inner in (cp.PyramidKVPress(0.5), cp.PerLayerCompressionPress(SNAP, [0.5] * 4)):
        with pytest.raises(cp.CachepressError, match="shares them in another way already"):
            LUKVPress(inner)
    with pytest.raises(cp.CachepressError, match="cannot wrap a budget of scope=.model."):
        LUKVPress(cp.AdaKVPress(SNAP, scope="model"))
