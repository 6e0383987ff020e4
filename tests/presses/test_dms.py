import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.presses.dms import DMSPress
from tests.learned import learned
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokenizer, tokens
from tests.tiny_cache import forward, kept

WINDOW = 6


def whole(ids):
    """Keys of an ordinary cache."""
    cache = DynamicCache()
    forward(tiny(), cache, input_ids=ids)
    return [layer.keys[0] for layer in cache.layers]


def rule(keys, threshold, window=WINDOW):
    """Pairs of a head that stay, by key norms."""
    n = keys.shape[0]
    return [i for i in range(n) if i >= n - window or -float(keys[i].norm()) >= threshold]


@pytest.mark.parametrize("chunk_size", [None, 9])
def test_pairs_below_the_threshold_go(chunk_size):
    ids = tokens(40)
    cache = cp.prefill(tiny(), ids, DMSPress(cp.KnormPress(), -4.5, WINDOW), chunk_size=chunk_size)
    held = kept(cache)
    for layer, keys in enumerate(whole(ids)):
        for head in range(2):
            assert held[layer][0][head] == rule(keys[head], -4.5)
    counts = {len(head) for layer in held for head in layer[0]}
    assert len(counts) > 2 and min(counts) >= WINDOW and max(counts) < 40


def test_a_padded_batch_is_judged_text_by_text():
    press = DMSPress(cp.KnormPress(), -4.5, WINDOW)
    text, other = tokens(17, seed=3), tokens(30, seed=4)
    ids = torch.cat([torch.cat([torch.zeros(1, 13, dtype=torch.long), text], 1), other])
    batch = kept(cp.prefill(tiny(), ids, press, attention_mask=(ids > 0).long()))
    alone = kept(cp.prefill(tiny(), text, press))
    assert [[[p - 13 for p in head] for head in layer[0]] for layer in batch] == [
        layer[0] for layer in alone
    ]


@pytest.mark.parametrize("interval", [1, 4])
def test_while_decoding_pairs_are_evicted_when_they_are_out_of_the_window(interval):
    model, ids, threshold = tiny(), tokens(20), -4.5
    cache, press = (
        DynamicCache(),
        DMSPress(cp.KnormPress(), threshold, WINDOW, decoding=True, interval=interval),
    )
    with press(model):
        forward(model, cache, input_ids=ids)
        for step in range(12):
            before = [store.snapshot.rows() for store in compressed_layers(cache)]
            forward(model, cache, input_ids=tokens(1, seed=step))
            if (step + 1) % interval:
                continue
            for layer, old in enumerate(before):
                seen = 21 + step
                for head in range(2):
                    places = [p for p in old.text_positions()[0, head].tolist() if p >= 0]
                    norms = dict(zip(places, old.keys[0, head].norm(dim=-1).tolist(), strict=False))
                    wanted = [p for p in places if p >= seen - WINDOW or -norms[p] >= threshold] + [
                        seen - 1
                    ]
                    assert kept(cache)[layer][0][head] == wanted, (layer, step)


def test_a_surrogate_decides_for_decoded_pairs_too():
    model = tiny()
    press = DMSPress(cp.KVzapPress(surrogate=learned()), -1e9, WINDOW, decoding=True, interval=2)
    cache = DynamicCache()
    with press(model):
        forward(model, cache, input_ids=tokens(20))
        for step in range(4):
            forward(model, cache, input_ids=tokens(1, seed=step))
    for store in compressed_layers(cache):
        token_state = store.snapshot.rows().token_state
        assert store.lengths.tolist() == [[24, 24]]
        assert torch.isfinite(token_state).all()


def test_kvzip_scores_are_held_against_the_threshold():
    ids = tokens(40)
    press = DMSPress(cp.KVzipPress(0.5), 0.05, 0)
    cache = cp.prefill(tiny(), ids, press, tokenizer=tokenizer())
    everything = cp.prefill(
        tiny(), ids, cp.KVzipPress(0.01, layerwise=True, n_sink=0), tokenizer=tokenizer()
    )
    for store, whole_store in zip(
        compressed_layers(cache), compressed_layers(everything), strict=True
    ):
        rows = whole_store.snapshot.rows()
        for head in range(2):
            scores = zip(
                whole_store.positions[0, head].tolist(),
                rows.token_state[0, head].tolist(),
                strict=True,
            )
            wanted = {p for p, score in scores if p >= 0 and score >= 0.05} | {0, 1, 2, 3}
            assert set(kept(cache)[compressed_layers(cache).index(store)][0][head]) == wanted


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DMSPress(cp.KnormPress(), "x"), "threshold: got 'x', wanted a number"),
        (lambda: DMSPress(cp.KnormPress(), 0.0, -1), "sliding_window_size: got -1"),
        (lambda: DMSPress(cp.DecodingPress(cp.KnormPress()), 0.0), "does so already"),
        (lambda: DMSPress(cp.KVzipPress(0.5), 0.0, decoding=True), "use KVzapPress"),
        (lambda: DMSPress(cp.KVzipPress(), 0.0), "give it a ratio above 0"),
        (lambda: cp.AdaKVPress(DMSPress(cp.KnormPress(), 0.0)), "as many as its own rule says"),
        (lambda: DMSPress(cp.KnormPress(), 0.0).with_ratio(0.5), "give threshold"),
    ],
)
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(cp.CachepressError, match=message):
        build()
