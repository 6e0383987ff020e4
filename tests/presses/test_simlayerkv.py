"""SimLayerKV against the paper's rule, written out with loops."""

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.presses.simlayerkv import SimLayerKVPress
from tests.presses.test_snapkv import (
    assert_each_text_is_as_if_alone,
    assert_second_turns_are_as_if_alone,
    recording,
    weights_of,
)
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward, kept, pressed


def share_of(view, layer, n_last, near):
    """Attention of the last queries to the pairs ``near``, on average over queries and heads."""
    _, h, g, q, _ = view.queries.shape
    total = 0.0
    for j in range(h):
        for k in range(g):
            for query in range(q - n_last, q):
                weights = weights_of(view, layer, 0, j, k, query)
                total += sum(weights[t] for t in near)
    return total / (h * g * n_last)


@pytest.mark.parametrize("n_last", [1, 5])
def test_lazy_layers_are_those_of_the_paper(n_last):
    ids, near = tokens(40), [*range(3), *range(30, 40)]
    press, seen = recording(SimLayerKVPress(0.999, n_last, n_recent=10, n_initial=3))
    pressed(tiny(), press, ids)
    shares = {depth: share_of(view, depth, n_last, near) for depth, [(view, _)] in seen.items()}
    assert len(shares) == 4
    for threshold in (min(shares.values()) - 1e-3, *(x + 1e-4 for x in shares.values())):
        cache = pressed(tiny(), SimLayerKVPress(threshold, n_last, 10, 3), ids)
        for depth, layer in enumerate(kept(cache)):
            wanted = near if shares[depth] > threshold else list(range(40))
            assert layer == [[wanted, wanted]]


def test_threshold_0_evicts_in_every_layer_and_1_in_none():
    model, ids, plain, cache = tiny(), tokens(40), DynamicCache(), DynamicCache()
    lazy = pressed(model, SimLayerKVPress(0.0, n_recent=7, n_initial=0), ids)
    assert kept(lazy) == [[[list(range(33, 40))] * 2]] * 4
    with SimLayerKVPress()(model):
        ours = forward(model, cache, input_ids=ids).logits
    assert torch.equal(ours, forward(model, plain, input_ids=ids).logits)
    assert [store.snapshot.segments for store in compressed_layers(cache)] == [()] * 4


def middle_threshold(n, **options):
    """A threshold that some of the layers of some of the texts exceed."""
    shares = []
    for seed in n:
        press, seen = recording(SimLayerKVPress(0.5, **options))
        pressed(tiny(), press, tokens(seed, seed=seed))
        for depth, [(view, _)] in seen.items():
            near = [t for t in range(seed) if t < press.n_initial or t >= seed - press.n_recent]
            shares.append(share_of(view, depth, 1, near))
    shares.sort()
    return (shares[len(shares) // 2] + shares[len(shares) // 2 - 1]) / 2


def test_each_sequence_is_judged_by_itself():
    options = {"n_recent": 6, "n_initial": 2}
    press = SimLayerKVPress(middle_threshold((31, 20, 25), **options), **options)
    ids = [tokens(n, seed=n) for n in (31, 20, 25)]
    lengths = [compressed_layers(pressed(tiny(), press, text)) for text in ids]
    found = {int(store.lengths[0, 0]) for text in lengths for store in text}
    assert 8 in found and found & {31, 20, 25}
    assert_each_text_is_as_if_alone(press, lengths=(31, 20, 25, 5, 1))


def test_turns_of_different_lengths_change_nothing():
    assert_second_turns_are_as_if_alone(SimLayerKVPress(0.5, n_recent=6, n_initial=2))


def test_texts_that_fit_are_whole():
    for n in (1, 5, 12):
        cache = pressed(tiny(), SimLayerKVPress(0.0, n_recent=8, n_initial=4), tokens(n))
        assert kept(cache) == [[[list(range(n))] * 2]] * 4


def test_a_lazy_layer_of_an_earlier_turn_goes_on_with_what_is_left():
    model, ids, cache = tiny(), tokens(50), DynamicCache()
    with SimLayerKVPress(0.0, n_recent=8, n_initial=2)(model):
        forward(model, cache, input_ids=ids[:, :30])
        forward(model, cache, input_ids=tokens(1))
        forward(model, cache, input_ids=ids[:, 30:34])
    assert kept(cache) == [[[[0, 1, *range(27, 35)]] * 2]] * 4


def test_exact_chunks_equal_one_go():
    press = SimLayerKVPress(0.5, n_last=4, n_recent=8, n_initial=2)
    once = cp.prefill(tiny(), tokens(40), press)
    assert kept(cp.prefill(tiny(), tokens(40), press, chunk_size=13)) == kept(once)


def test_the_spelling_and_bad_options():
    press = SimLayerKVPress(0.9)
    spelling = "SimLayerKVPress(lazy_threshold=0.9, n_last=1, n_recent=1024, n_initial=4)"
    assert repr(press) == spelling
    assert cp.parse(spelling) == press == cp.parse("simlayerkv(0.9)")
    for options, message in (
        ({"lazy_threshold": 1.1}, "lazy_threshold: got 1.1, wanted a number from 0 to 1"),
        ({"n_last": 0}, "n_last: got 0, wanted a whole number of at least 1"),
        ({"n_recent": 0}, "n_recent: got 0, wanted a whole number of at least 1"),
        ({"n_initial": -1}, "n_initial: got -1, wanted a whole number of at least 0"),
    ):
        with pytest.raises(cp.CachepressError, match=message):
            SimLayerKVPress(**options)
    with pytest.raises(cp.CachepressError, match="no compression ratio to set"):
        press.with_ratio(0.5)
    with pytest.raises(cp.CachepressError, match="keeps as many as its own rule"):
        cp.AdaKVPress(press)
