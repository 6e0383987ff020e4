"""Prefill in chunks: what is bounded, what is refused, and that the pipeline can ask for it."""

import pytest
import torch
from transformers import DynamicCache, pipeline

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.cache.layer import CompressedLayer
from tests.bounds import close
from tests.tiny import ARCHITECTURES, tokenizer, tokens, words
from tests.tiny import exact_tiny as tiny
from tests.tiny_cache import forward, kept

PRESS = cp.SnapKVPress(0.5, window_size=6)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("size", [1, 7, 39, 40, 100])
def test_exact_chunks_equal_one_go(name, size):
    model, ids = tiny(name), tokens(40)
    once, chunked = (cp.prefill(model, ids, PRESS, chunk_size=n) for n in (None, size))
    assert kept(chunked) == kept(once)
    step = tokens(2, seed=1)
    ours = forward(model, chunked, input_ids=step).logits
    wanted = forward(model, once, input_ids=step).logits
    close(ours, wanted)


def test_chunks_without_a_press_equal_one_forward():
    model, ids = tiny(), tokens(40)
    cache, plain = cp.prefill(model, ids, chunk_size=9), DynamicCache()
    forward(model, plain, input_ids=ids)
    close(cache.layers[3].keys, plain.layers[3].keys)


@pytest.mark.parametrize("adaptive", [False, True])
def test_online_pairs_never_exceed_budget_plus_chunk(adaptive, monkeypatch):
    held, update = [], CompressedLayer.update

    def observed(self, *args, **kwargs):
        out = update(self, *args, **kwargs)
        held.append(int(self.lengths.sum(-1).max()))
        return out

    monkeypatch.setattr(CompressedLayer, "update", observed)
    model, press = tiny(), cp.SnapKVPress(n_kept=20, window_size=6)
    press = cp.AdaKVPress(press) if adaptive else press
    cache = cp.prefill(model, tokens(400), press, chunk_size=16, mode="online")
    assert max(held) == 2 * (20 + 16)
    assert compressed_layers(cache)[0].lengths.sum() == 40
    assert cache.get_seq_length() == 400


def test_an_exact_prefill_after_an_earlier_turn():
    model, ids = tiny(), tokens(60)
    once, chunked = DynamicCache(), DynamicCache()
    for cache, size in ((once, None), (chunked, 8)):
        cp.prefill(model, ids[:, :25], PRESS, cache, chunk_size=size)
        cp.prefill(model, ids[:, 25:], PRESS, cache, chunk_size=size)
    assert kept(once) == kept(chunked)
    assert compressed_layers(once)[0].lengths.tolist() == [[30, 30]]


def test_a_padded_batch_is_read_in_chunks():
    model, ids = tiny(), tokens(40, batch=2)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :27] = 0
    once, chunked = (
        cp.prefill(model, ids, PRESS, attention_mask=mask, chunk_size=n) for n in (None, 8)
    )
    assert kept(chunked) == kept(once)
    assert compressed_layers(chunked)[0].lengths.tolist() == [[6, 6], [20, 20]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "prefill chunk size: got 0"),
        ({"chunk_size": 2.5}, "prefill chunk size: got 2.5"),
        ({"mode": "fast"}, "prefill mode: got 'fast', wanted one of exact, online"),
        ({"mode": "online"}, "give a chunk size"),
        ({"press": None, "storage": "int8"}, "needs a press"),
    ],
)
def test_what_is_wrong_is_one_clear_line(options, message):
    options = {"press": PRESS, **options}
    with pytest.raises(cp.CachepressError, match=message):
        cp.prefill(tiny(), tokens(20), **options)


def test_an_empty_prompt_is_refused():
    with pytest.raises(cp.CachepressError, match=r"got shape \(1, 0\)"):
        cp.prefill(tiny(), torch.zeros(1, 0, dtype=torch.long), PRESS)


def test_the_pipeline_reads_in_chunks_and_quantizes():
    pipe = pipeline("kv-press-text-generation", model=tiny(), tokenizer=tokenizer())
    options = {"questions": [words(3, seed=1), words(2, seed=2)], "press": PRESS}
    plain = pipe(words(80), **options)
    assert pipe(words(80), prefill_chunk_size=11, **options) == plain
    stats = pipe(words(400), storage="int4", return_stats=True, **options)["stats"]
    full = pipe(words(400), return_stats=True, **options)["stats"]
    assert stats.cache.bytes_after < 0.75 * full.cache.bytes_after
    online = pipe(
        words(80), prefill_chunk_size=11, prefill_mode="online", return_stats=True, **options
    )
    assert online["stats"].cache.pairs_held == 4 * 2 * 41


def test_a_context_beyond_the_trained_length_must_be_asked_for():
    pipe = pipeline("kv-press-text-generation", model=tiny(), tokenizer=tokenizer())
    options = {"question": words(3), "press": cp.KnormPress(n_kept=16), "max_new_tokens": 3}
    with pytest.raises(cp.CachepressError, match="the context has 902 tokens"):
        pipe(words(900), **options)
    stats = pipe(
        words(900),
        beyond_trained_length=True,
        prefill_chunk_size=64,
        prefill_mode="online",
        return_stats=True,
        **options,
    )["stats"]
    assert stats.context_tokens == 902
    assert stats.cache.pairs_held == 4 * 2 * 16
