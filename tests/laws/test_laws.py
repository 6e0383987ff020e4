"""The properties that every press obeys on every architecture."""

from fractions import Fraction
from math import floor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers, size_of
from tests.bounds import close
from tests.laws.presses import every_press, name_of
from tests.tiny import ARCHITECTURES, FULL_ONLY, exact_tiny, tokens
from tests.tiny_cache import forward, kept, pressed

PRESSES = every_press(0.5)
by_name = pytest.mark.parametrize("press", PRESSES, ids=name_of)
GATED = ("qwen3_next",)
"""Architectures that change what attention gave before they project it."""
by_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def greedy(model, ids, n=8, **options):
    with torch.no_grad():
        return model.generate(
            ids, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0, **options
        )


@by_architecture
def test_ratio_0_equals_no_press(name):
    model, ids = exact_tiny(name), tokens(40)
    plain_cache, cache = DynamicCache(config=model.config), DynamicCache()
    plain = forward(model, plain_cache, input_ids=ids).logits
    plain_tokens = greedy(model, ids)
    with cp.KnormPress(0.0)(model):
        ours = forward(model, cache, input_ids=ids).logits
        assert torch.equal(greedy(model, ids), plain_tokens)
    assert torch.equal(ours, plain)
    for n in (1, 3):
        step = tokens(n, seed=n)
        decoded = forward(model, cache, input_ids=step).logits
        wanted = forward(model, plain_cache, input_ids=step).logits
        close(decoded, wanted)


@by_architecture
@by_name
def test_keeps_the_exact_count_in_order(name, press):
    if press.needs.projection and name in GATED:
        with pytest.raises(cp.UnsupportedError, match="output projection"):
            pressed(exact_tiny(name), press, tokens(41))
        return
    cache = pressed(exact_tiny(name), press, tokens(41, batch=2))
    for layer in kept(cache):
        for row in layer:
            for head in row:
                assert len(head) == 20
                assert head == sorted(set(head))
                assert head[0] >= 0 and head[-1] <= 40


@by_name
@pytest.mark.counts
@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 40), percent=st.integers(0, 99))
def test_counts_are_exact_decimals(press, n, percent):
    cache = pressed(MODEL, press.with_ratio(percent / 100), tokens(n))
    wanted = max(1, floor(n * (1 - Fraction(percent, 100))))
    assert compressed_layers(cache)[0].lengths.tolist() == [[wanted, wanted]]


MODEL = exact_tiny()


def test_named_counts():
    def count(ratio, *seen):
        return (
            cp.KnormPress(ratio).budget.count(SimpleNamespace(n_seen=torch.tensor(seen))).tolist()
        )

    assert count(0.9, 1000, 7, 1) == [100, 1, 1]
    assert count(0.5, 7) == [3]
    assert count(1 / 3, 10**6) == [666666]


@by_name
@pytest.mark.parametrize("name", FULL_ONLY)
def test_a_sequence_of_a_padded_batch_equals_that_sequence_alone(name, press):
    if name == "qwen3_moe" and press != PRESSES[0]:
        pytest.skip("one press is enough for an architecture whose attention is Qwen3's")
    model = exact_tiny(name)
    texts = [tokens(n, seed=n) for n in (31, 17, 4)]
    ids = torch.zeros(3, 31, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[31 - text.shape[1] :] = text[0]
    mask = (ids > 0).long()
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = pressed(model, press, ids, attention_mask=mask, position_ids=position_ids)
    step = tokens(1, batch=3, seed=9)
    longer = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=-1)
    logits = forward(
        model, batch, input_ids=step, attention_mask=longer, position_ids=mask.sum(-1)[:, None]
    ).logits
    for i, text in enumerate(texts):
        alone = pressed(model, press, text)
        pad = 31 - text.shape[1]
        for layer, layer_alone in zip(kept(batch), kept(alone), strict=True):
            heads = [[p - pad for p in head[:-1]] for head in layer[i]]
            assert heads == layer_alone[0]
        ours = forward(model, alone, input_ids=step[i : i + 1]).logits
        close(logits[i], ours[0])


@by_name
def test_right_padding_is_evicted_too(press):
    text, other = tokens(12, seed=3), tokens(20, seed=4)
    ids = torch.cat([torch.cat([text, torch.zeros(1, 8, dtype=torch.long)], -1), other])
    batch = pressed(MODEL, press, ids, attention_mask=(ids > 0).long())
    alone = pressed(MODEL, press, text)
    assert [layer[0] for layer in kept(batch)] == [layer[0] for layer in kept(alone)]


@by_name
def test_a_second_turn_is_compressed_to_the_same_count(press):
    model, ids = exact_tiny(), tokens(40)
    cache = DynamicCache()
    with press(model):
        forward(model, cache, input_ids=ids[:, :23])
        assert compressed_layers(cache)[0].lengths.tolist() == [[11, 11]]
        forward(model, cache, input_ids=ids[:, 23:])
    for store in compressed_layers(cache):
        assert store.lengths.tolist() == [[20, 20]]
        assert store.get_seq_length() == 40
    for layer in kept(cache):
        for head in layer[0]:
            assert head == sorted(set(head))


def test_the_first_turn_only_when_asked():
    cache = DynamicCache()
    with cp.KnormPress(0.5)(MODEL, turns="first"):
        forward(MODEL, cache, input_ids=tokens(20))
        forward(MODEL, cache, input_ids=tokens(10))
    assert compressed_layers(cache)[0].lengths.tolist() == [[20, 20]]


@by_name
def test_seen_never_shrinks_and_decoding_is_not_scored(press):
    cache = pressed(MODEL, press, tokens(30))
    with press(MODEL):
        for step in range(5):
            forward(MODEL, cache, input_ids=tokens(1, seed=step))
            assert cache.get_seq_length() == 31 + step
    assert compressed_layers(cache)[0].lengths.tolist() == [[20, 20]]
    assert kept(cache)[0][0][0][-5:] == [30, 31, 32, 33, 34]


@by_architecture
def test_decoding_attends_like_a_masked_full_cache(name):
    """The compressed cache against the whole one with the evicted pairs masked by hand."""
    model, ids, step = exact_tiny(name), tokens(40), tokens(3, seed=5)
    press = cp.StreamingLLMPress(0.5, n_sink=3)
    logits = forward(model, pressed(model, press, ids), input_ids=step).logits
    whole = DynamicCache()
    with cp.KnormPress(0.0)(model):
        forward(model, whole, input_ids=ids)
    dropped = torch.ones(1, 43, dtype=torch.long)
    dropped[:, 3:23] = 0
    if name in FULL_ONLY:
        masked = forward(
            model,
            whole,
            input_ids=step,
            attention_mask=dropped,
            position_ids=torch.arange(40, 43)[None],
        ).logits
        close(logits, masked)
    assert compressed_layers(pressed(model, press, ids))[0].positions[0, 0].tolist() == [
        *range(3),
        *range(23, 40),
    ]


@by_name
def test_repr_is_the_spelling(press):
    assert cp.parse(repr(press)) == press
    assert cp.parse(repr(press.with_ratio(0.25))).compression_ratio == 0.25


@by_name
def test_bytes_reported_are_bytes_allocated(press):
    cache = pressed(MODEL, press, tokens(90))
    storage = sum(
        tensor.untyped_storage().nbytes()
        for store in compressed_layers(cache)
        for tensor in store.tensors()
        if isinstance(tensor, torch.Tensor)
    )
    size = size_of(cache)
    assert size.bytes_after == storage
    row = 2 * 8 * 8 + 4 + 8 * press.needs.token_state
    assert size.bytes_after == 4 * 2 * 64 * row
    assert (size.pairs_seen, size.pairs_held, size.ratio) == (720, 360, 0.5)


@by_name
@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.2, "abc", None, True, float("nan")])
def test_a_bad_ratio_fails_when_the_press_is_built(press, ratio):
    with pytest.raises(cp.CachepressError, match="compression_ratio"):
        press.with_ratio(ratio)
