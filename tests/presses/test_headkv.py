"""HeadKV: the shares of the heads, and what they hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.presses._heads import copying_scores
from cachepress.presses.composed import ComposedPress
from cachepress.presses.headkv import HeadKVPress, shares
from cachepress.presses.think import ThinKPress
from tests.presses.test_snapkv import assert_each_text_is_as_if_alone, recording, two_turns
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward, kept, pressed

SCORES = ((0.9, 0.1), (0.0, 0.5), (0.05, 1.0), (0.3, 0.15))
SNAP = cp.SnapKVPress(0.75, window_size=4)


def counts(cache, row=0):
    return [store.lengths[row].tolist() for store in compressed_layers(cache)]


@pytest.mark.parametrize(
    ("beta", "kept", "own", "seen", "wanted"),
    [
        # 2 of 10 pairs are each head's own, and half of the other 8; the pool is 4 * 4 = 16.
        (2, 10, 2, 100, [[10, 6], [14, 10]]),
        # The pool is everything, but for one pair each: 39 pairs for the other three.
        (1, 10, 0, 100, [[10, 1], [19, 10]]),
        # What the third head cannot have goes to the others: 28 pairs by their parts of 10, 6, 10.
        (2, 10, 2, 12, [[11, 6], [12, 11]]),
        # Everything fits.
        (2, 10, 2, 10, [[10, 10], [10, 10]]),
        # Fixed parts of 2.5, a pool of 10: shares of 2.5, 0, 5 and 2.5, and one remainder each.
        (2, 5, 0, 100, [[5, 3], [7, 5]]),
        (2, 1, 0, 100, [[1, 1], [1, 1]]),
        (2, 0, 0, 100, [[0, 0], [0, 0]]),
        (10**9, 10, 0, 100, [[10, 10], [10, 10]]),
    ],
)
def test_shares_are_those_of_the_paper(beta, kept, own, seen, wanted):
    assert shares(((1, 0), (2, 1)), beta, kept, own, seen) == wanted


@given(
    scores=st.lists(
        st.lists(st.floats(0, 1), min_size=3, max_size=3).map(tuple), min_size=1, max_size=6
    ).map(tuple),
    beta=st.floats(1, 50),
    kept=st.integers(1, 60),
    own=st.integers(0, 70),
    more=st.integers(0, 100),
)
def test_the_total_is_exact_and_bounds_hold(scores, beta, kept, own, more):
    found = shares(scores, beta, kept, own, kept + more)
    rows = [n for layer in found for n in layer]
    weights = [x for layer in scores for x in layer]
    assert [len(layer) for layer in found] == [3] * len(scores)
    assert sum(rows) == kept * len(rows)
    assert min(rows) >= max(1, min(own, kept)) and max(rows) <= kept + more
    for (low, fewer), (high, rather) in zip(
        sorted(zip(weights, rows, strict=True)),
        sorted(zip(weights, rows, strict=True))[1:],
        strict=False,
    ):
        assert low == high or fewer <= rather + 1
    own = min(own, kept)
    fixed = own + (kept - own) * (1 - 1 / beta)
    targets = [fixed + (kept - fixed) * len(rows) * x / (sum(weights) or 1) for x in weights]
    if sum(weights) > 0 and min(targets) >= 1 and max(targets) <= kept + more:
        assert all(abs(n - x) < 1 + 1e-6 for n, x in zip(rows, targets, strict=True))


@pytest.mark.parametrize("inner", [cp.KnormPress(0.75), SNAP, cp.StreamingLLMPress(0.75, n_sink=2)])
def test_each_head_keeps_its_best_pairs(inner):
    press, seen = recording(inner)
    cache = pressed(tiny(), HeadKVPress(press, SCORES, beta=2), tokens(40))
    own = {cp.KnormPress: 0, cp.SnapKVPress: 4, cp.StreamingLLMPress: 2}[type(inner)]
    assert counts(cache) == shares(SCORES, 2, 10, own, 40)
    assert sum(map(sum, counts(cache))) == 8 * 10
    for depth, layer in enumerate(kept(cache)):
        [(_, score)] = seen[depth]
        for h, rows in enumerate(layer[0]):
            best = sorted(range(40), key=lambda t: (score[0, h, t], t), reverse=True)
            assert rows == sorted(best[: len(rows)])


def test_without_scores_retrieval_heads_are_found():
    for name in ("llama", "gpt_oss"):
        cache = pressed(tiny(name), HeadKVPress(SNAP), tokens(40))
        assert counts(cache) == shares(copying_scores(tiny(name)), 1.2, 10, 4, 40)
        assert len({n for layer in counts(cache) for n in layer}) > 1


def test_scores_are_read_from_a_file_and_checked_before_any_work(tmp_path):
    file = tmp_path / "heads.tsv"
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in SCORES))
    press = HeadKVPress(SNAP, str(file))
    assert press.for_model(tiny()) == HeadKVPress(SNAP, SCORES)
    for scores, message in (
        (str(tmp_path / "none"), "scores: got .*none.*No such file"),
        (SCORES[1:], "scores: got scores of 3 layers of 2 KV heads, and Llama"),
    ):
        with pytest.raises(cp.CachepressError, match=message), HeadKVPress(SNAP, scores)(tiny()):
            pass


def test_padding_changes_nothing_and_each_text_has_its_own_total():
    press = HeadKVPress(cp.SnapKVPress(0.5, window_size=4), SCORES)
    assert_each_text_is_as_if_alone(press)
    texts = torch.cat([tokens(31, seed=1), tokens(31, seed=2)])
    mask = torch.ones(2, 31, dtype=torch.long)
    mask[0, :11] = 0
    cache = cp.prefill(tiny(), texts, press, attention_mask=mask)
    assert [sum(map(sum, counts(cache, row))) for row in (0, 1)] == [80, 120]


def test_second_turns_and_chunks_end_at_the_same_counts():
    model, ids, cache = tiny(), tokens(60), DynamicCache()
    press = HeadKVPress(SNAP, SCORES)
    once = counts(pressed(model, press, ids))
    with press(model):
        forward(model, cache, input_ids=ids[:, :25])
        forward(model, cache, input_ids=ids[:, 25:])
    assert counts(cache) == once == shares(SCORES, 1.2, 15, 4, 60)
    assert counts(cp.prefill(model, ids, press, chunk_size=20, mode="online")) == once
    first = [tokens(n, seed=n) for n in (31, 18)]
    second = [tokens(n, seed=n) for n in (3, 14)]
    batch, mask = two_turns(model, press, first, second)
    own = mask.cumsum(-1) - 1
    for i in range(2):
        alone, _ = two_turns(model, press, first[i : i + 1], second[i : i + 1])
        for layer, layer_alone in zip(kept(batch), kept(alone), strict=True):
            assert [own[i][head].tolist() for head in layer[i]] == layer_alone[0]


def test_a_layer_below_the_average_is_compressed_again():
    model, ids, cache = tiny(), tokens(60), DynamicCache()
    scores = ((1.0, 1.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    with HeadKVPress(cp.KnormPress(0.5), scores, beta=1)(model):
        forward(model, cache, input_ids=ids[:, :40])
        first = counts(cache)
        forward(model, cache, input_ids=ids[:, 40:44])
    second = counts(cache)
    assert sum(map(sum, first)) == 8 * 20 and sum(map(sum, second)) == 8 * 22
    assert second == shares(scores, 1, 22, 0, 44)


def test_ratio_0_keeps_everything():
    model, ids, cache, plain = tiny(), tokens(40), DynamicCache(), DynamicCache()
    with HeadKVPress(cp.KnormPress(0.0), SCORES)(model):
        ours = forward(model, cache, input_ids=ids).logits
    assert torch.equal(ours, forward(model, plain, input_ids=ids).logits)
    assert counts(cache) == [[40, 40]] * 4


@pytest.mark.counts
def test_a_bound_on_bytes_holds():
    limit = 80_000
    press = HeadKVPress(cp.KnormPress(max_bytes=limit), SCORES)
    cache = pressed(tiny(), press, tokens(400))
    size = cp.size_of(cache)
    assert 0.7 * limit < size.bytes_after <= limit
    assert len({n for layer in counts(cache) for n in layer}) > 4


def test_a_running_generation_is_bound_in_total():
    model, cache = tiny(), DynamicCache()
    press = cp.DecodingPress(HeadKVPress(cp.KnormPress(), SCORES), 4, 10)
    with press(model):
        forward(model, cache, input_ids=tokens(30))
        assert counts(cache) == shares(SCORES, 1.2, 10, 0, 30)
        for step in range(8):
            forward(model, cache, input_ids=tokens(1, seed=step))
    assert counts(cache) == shares(SCORES, 1.2, 10, 0, 38)


def test_pairs_that_are_gone_are_made_up_for_by_others():
    model, ids, cache = tiny(), tokens(60), DynamicCache()
    scores = ((1.0, 0.9), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    press, growing = HeadKVPress(cp.KnormPress(n_kept=4), scores, beta=1), 0
    with press(model):
        forward(model, cache, input_ids=ids[:, :40])
        assert counts(cache) == shares(scores, 1, 4, 0, 40)
    later = HeadKVPress(cp.KnormPress(n_kept=6), scores, beta=1)
    with later(model):
        forward(model, cache, input_ids=ids[:, 40:43])
    assert sum(map(sum, counts(cache))) == 8 * 6
    for depth, layer in enumerate(counts(cache)):
        for h, (n, wanted) in enumerate(
            zip(layer, shares(scores, 1, 6, 0, 43)[depth], strict=True)
        ):
            held = shares(scores, 1, 4, 0, 40)[depth][h] + 3
            assert n >= min(wanted, held) and n <= held
            growing += held < wanted
    assert growing == 2


def test_around_and_inside_other_presses():
    model, ids = tiny(), tokens(40)
    alone = kept(pressed(model, HeadKVPress(SNAP, SCORES), ids))
    thin = pressed(model, HeadKVPress(ComposedPress([ThinKPress(0.5, 4), SNAP]), SCORES), ids)
    assert kept(thin) == alone
    assert all(store.snapshot.segments[0].keys.shape[-1] == 4 for store in compressed_layers(thin))
    assert kept(pressed(model, HeadKVPress(cp.AdaKVPress(SNAP), SCORES), ids)) == alone
    weighed = HeadKVPress(cp.CriticalKVPress(SNAP), SCORES)
    assert kept(pressed(model, weighed, ids)) == kept(pressed(model, weighed.press, ids))
    turned = pressed(model, cp.KeyRerotationPress(HeadKVPress(SNAP, SCORES)), ids)
    assert kept(turned) == alone


def test_the_spelling_and_bad_options():
    press = HeadKVPress(cp.KnormPress(0.5), [[0.5, 1], [0.25, 0]], 1.5)
    spelling = (
        "HeadKVPress(press=KnormPress(compression_ratio=0.5), "
        "scores=((0.5, 1), (0.25, 0)), beta=1.5)"
    )
    assert repr(press) == spelling and cp.parse(spelling) == press
    assert cp.parse("headkv(knorm(0.5))") == HeadKVPress(cp.KnormPress(0.5))
    assert press.compression_ratio == 0.5
    assert press.with_ratio(0.25).press == cp.KnormPress(0.25)
    for beta in (0.5, None, True, "1"):
        with pytest.raises(cp.CachepressError, match="beta: got .* wanted a number of at least 1"):
            HeadKVPress(SNAP, beta=beta)
    with pytest.raises(cp.CachepressError, match="scores: wanted a number of at least 0"):
        HeadKVPress(SNAP, ((0.5, -1.0),))
    for inner in (
        cp.PyramidKVPress(0.5),
        cp.PerLayerCompressionPress(SNAP, [0.5] * 4),
    ):
        with pytest.raises(cp.CachepressError, match="shares them among layers already"):
            HeadKVPress(inner)
