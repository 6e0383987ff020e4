"""ThinK against the paper's formula, and what is stored against a cache thinned by hand."""

from math import sqrt
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.generation.cache_files import load_cache, save_cache
from cachepress.presses.composed import ComposedPress
from cachepress.presses.think import ThinKPress
from tests.bounds import close, half_a_step
from tests.presses.test_snapkv import left_padded, two_turns
from tests.tiny import FULL_ONLY, tokens
from tests.tiny import exact_tiny as tiny
from tests.tiny import tiny as single
from tests.tiny_cache import allocated, forward, kept, pressed

GOLDEN = Path(__file__).parents[1] / "golden"
THINK = ThinKPress(0.5, window_size=6)
SNAP = cp.SnapKVPress(0.5, window_size=6)


def stored(cache):
    """The channels of each sequence and head, by layer, ``[B, H, D]``, of the compressed pairs."""
    found = []
    for store in compressed_layers(cache):
        block = store.snapshot.segments[0]
        chosen = torch.zeros(len(block.key_channels), block.width, dtype=torch.bool)
        found.append(chosen.scatter(1, block.key_channels, True).unflatten(0, block.shape))
    return found


def thinned(model, ids, channels, **inputs):
    """An ordinary cache of the whole text whose keys are zero in all other channels."""
    cache = DynamicCache()
    forward(model, cache, input_ids=ids, **inputs)
    for layer, chosen in zip(cache.layers, channels, strict=True):
        layer.keys = layer.keys * chosen.unsqueeze(2)
    return cache


def recording(press):
    seen = []

    class Recording(ThinKPress):
        def key_channels(self, view, mask):
            chosen = super().key_channels(view, mask)
            seen.append((view, mask, chosen))
            return chosen

    return Recording(**vars(press)), seen


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_channels_are_those_of_the_paper(name):
    press, seen = recording(ThinKPress(0.4, window_size=5))
    first = cp.StreamingLLMPress(0.5, n_sink=2)
    pressed(tiny(name), ComposedPress([first, press]), tokens(20, batch=2))
    for view, mask, chosen in seen:
        b, h, g, q, d = view.queries.shape
        for i in range(b):
            for j in range(h):
                weights = []
                for channel in range(d):
                    key = [float(view.keys[i, j, t, channel]) for t in range(20) if mask[i, j, t]]
                    assert len(key) == 10
                    asked = 0.0
                    for k in range(g):
                        query = view.queries[i, j, k, q - 5 :, channel]
                        asked += sum(float(x) ** 2 for x in query) / g
                    weights.append(sqrt(asked) * sqrt(sum(x**2 for x in key)))
                best = sorted(range(d), key=lambda c: weights[c])[-(d - int(0.4 * d)) :]
                assert chosen[i, j].nonzero()[:, 0].tolist() == sorted(best)
    assert len(seen) == 4


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 8), (0.1, 8), (0.3, 6), (0.7, 3), (0.99, 1)])
def test_removes_the_floor_and_bytes_shrink(ratio, left):
    cache = pressed(single(), ThinKPress(ratio, 6), tokens(200))
    for store in compressed_layers(cache):
        block = None if not store.snapshot.segments else store.snapshot.segments[0]
        assert (left == 8) == (block is None or block.key_channels is None)
        if block is None:
            continue
        assert block.keys.shape[-1] == left
        # 224 slots: a key of `left` numbers, a value of 8, a position; and the list of channels.
        index = 0 if block.key_channels is None else 2 * left * 8
        assert allocated(store) == 2 * 224 * (left * 4 + 8 * 4 + 4) + index == store.nbytes
    assert cp.size_of(cache).bytes_after == allocated(compressed_layers(cache))
    assert cp.size_of(cache).pairs_held == 4 * 2 * 200


def test_ratio_0_equals_no_press():
    model, cache, plain = tiny(), DynamicCache(), DynamicCache()
    with ThinKPress(0.0)(model):
        ours = forward(model, cache, input_ids=tokens(30)).logits
    assert torch.equal(ours, forward(model, plain, input_ids=tokens(30)).logits)
    assert [store.snapshot.segments for store in compressed_layers(cache)] == [()] * 4


@pytest.mark.parametrize("name", FULL_ONLY)
def test_decoding_equals_a_cache_thinned_by_hand(name):
    model, ids = tiny(name), tokens(40)
    cache = pressed(model, THINK, ids)
    whole = thinned(model, ids, stored(cache))
    for step in (tokens(1), tokens(3, seed=2), tokens(30, seed=3), tokens(1, seed=4)):
        ours = forward(model, cache, input_ids=step).logits
        wanted = forward(model, whole, input_ids=step).logits
        close(ours, wanted)


@pytest.mark.parametrize(
    "presses", [[cp.StreamingLLMPress(0.5), THINK], [THINK, cp.StreamingLLMPress(0.5)]]
)
def test_with_pairs_evicted_decoding_equals_a_masked_cache(presses):
    model, ids, step = tiny(), tokens(40), tokens(3, seed=5)
    cache = pressed(model, ComposedPress(presses), ids)
    assert kept(cache)[0][0][0] == [*range(4), *range(24, 40)]
    whole = thinned(model, ids, stored(cache))
    mask = torch.ones(1, 43, dtype=torch.long)
    mask[:, 4:24] = 0
    place = torch.arange(40, 43)[None]
    wanted = forward(model, whole, input_ids=step, attention_mask=mask, position_ids=place).logits
    ours = forward(model, cache, input_ids=step).logits
    close(ours, wanted)


def test_a_padded_batch_equals_each_text_alone():
    model, texts = tiny(), [tokens(n, seed=n) for n in (31, 12, 4, 1)]
    ids, mask = left_padded(texts)
    for press in (THINK, ComposedPress([SNAP, THINK])):
        batch = cp.prefill(model, ids, press, attention_mask=mask)
        step = tokens(1, batch=4, seed=9)
        longer = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=-1)
        place = mask.sum(-1)[:, None]
        logits = forward(
            model, batch, input_ids=step, attention_mask=longer, position_ids=place
        ).logits
        for i, text in enumerate(texts):
            alone = cp.prefill(model, text, press)
            for ours, wanted in zip(stored(batch), stored(alone), strict=True):
                assert torch.equal(ours[i], wanted[0])
            wanted = forward(model, alone, input_ids=step[i : i + 1]).logits
            close(logits[i], wanted[0])


def test_exact_chunks_equal_one_go():
    once = cp.prefill(tiny(), tokens(40), THINK)
    chunked = cp.prefill(tiny(), tokens(40), THINK, chunk_size=12)
    for ours, wanted in zip(stored(chunked), stored(once), strict=True):
        assert torch.equal(ours, wanted)


def test_heads_with_pairs_of_their_own_are_thinned_each():
    model, ids = tiny(), tokens(80)
    ada = cp.AdaKVPress(cp.SnapKVPress(0.5, window_size=6), alpha_safeguard=0.0)
    before = pressed(model, ada, ids)
    for presses in ([ada, THINK], [THINK, ada]):
        cache = pressed(model, ComposedPress(presses), ids)
        assert kept(cache) == kept(before)
        assert any(len(set(store.lengths[0].tolist())) > 1 for store in compressed_layers(cache))
        for store, whole, chosen in zip(
            compressed_layers(cache), compressed_layers(before), stored(cache), strict=True
        ):
            assert torch.equal(chosen.sum(-1), torch.full((1, 2), 4))
            ours, wanted = store.snapshot.rows(), whole.snapshot.rows()
            real = (wanted.positions >= 0)[..., None]
            assert torch.equal(ours.keys * real, wanted.keys * chosen.unsqueeze(2) * real)
            assert torch.equal(ours.values * real, wanted.values * real)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_pairs_are_thin_too(bits):
    model, ids, step, residual = tiny(), tokens(200), tokens(2, seed=1), 5
    whole = thinned(model, ids, stored(pressed(model, THINK, ids)))
    cache = DynamicCache()
    with THINK(model, storage=cp.Codec(bits, residual)):
        forward(model, cache, input_ids=ids)
    for store, layer in zip(compressed_layers(cache), whole.layers, strict=True):
        old, new = store.snapshot.segments
        assert old.keys.codes.shape[-1] * 8 // bits == new.keys.shape[-1] == 4
        assert allocated(store) == store.nbytes
        for name, dim in (("keys", 2), ("values", 3)):
            ours, wanted = getattr(store, name), getattr(layer, name)
            assert ((ours - wanted).abs() <= half_a_step(wanted, dim, bits)).all()
            close(ours[:, :, -residual:], wanted[:, :, -residual:])
            setattr(layer, name, ours)
    # What is decoded after that reads just these numbers.
    wanted = forward(model, whole, input_ids=step).logits
    close(forward(model, cache, input_ids=step).logits, wanted)


def test_a_cache_made_under_inference_mode_goes_on_with_gradients():
    model, ids, step = tiny(), tokens(40), tokens(2, seed=1)
    with torch.inference_mode():
        cache = cp.prefill(model, ids, ComposedPress([SNAP, THINK]))
    logits = model(step, past_key_values=cache).logits
    logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_int4_needs_an_even_number_of_channels():
    with pytest.raises(cp.CachepressError, match="int4 storage packs .* got 5 channels"):
        cp.prefill(tiny(), tokens(100), ThinKPress(0.4), storage=cp.Codec(4, residual=5))


def test_forks_share_what_is_left():
    model, ids = tiny(), tokens(60)
    steps = tokens(2, batch=3, seed=7)
    for press in (THINK, ComposedPress([cp.AdaKVPress(SNAP), THINK])):
        cache = pressed(model, press, ids)
        one, many = cp.fork(cache), cp.fork(cache, 3)
        block = compressed_layers(cache)[0].snapshot.segments[0]
        assert compressed_layers(many)[0].snapshot.segments[0] is block
        batched = forward(model, many, input_ids=steps).logits
        for i in range(3):
            branch = cp.fork(one)
            ours = forward(model, branch, input_ids=steps[i : i + 1]).logits
            close(batched[i], ours[0])
        for store in compressed_layers(many):
            store.batch_select_indices(torch.tensor([2, 0]))
        pair = pressed(model, press, torch.cat([ids, tokens(60, seed=1)]))
        chosen = stored(pair)[0]
        pair.reorder_cache(torch.tensor([1, 1, 0]))
        assert torch.equal(stored(pair)[0], chosen[[1, 1, 0]])
        ours = forward(model, pair, input_ids=steps).logits[2]
        wanted = forward(model, cp.fork(cache), input_ids=steps[2:]).logits[0]
        close(ours, wanted)


def test_a_saved_cache_is_as_thin_when_it_is_loaded(tmp_path):
    model, ids, step = tiny(), tokens(60), tokens(2, seed=1)
    cache = pressed(model, ComposedPress([cp.AdaKVPress(SNAP), THINK]), ids)
    save_cache(cache, tmp_path / "thin.safetensors", model)
    loaded = load_cache(tmp_path / "thin.safetensors", model)
    assert cp.size_of(loaded).bytes_after == cp.size_of(cache).bytes_after
    for ours, wanted in zip(stored(loaded), stored(cache), strict=True):
        assert torch.equal(ours, wanted)
    ours = forward(model, loaded, input_ids=step).logits
    assert torch.equal(ours, forward(model, cache, input_ids=step).logits)


def test_a_second_turn_chooses_for_all_pairs():
    model, ids, cache = tiny(), tokens(50), DynamicCache()
    press = ComposedPress([SNAP, THINK])
    with press(model):
        forward(model, cache, input_ids=ids[:, :30])
        before = dict(zip(*first_head(cache), strict=True))
        first = stored(cache)[0][0, 0]
        forward(model, cache, input_ids=ids[:, 30:])
    second = stored(cache)[0][0, 0]
    assert [store.lengths.tolist() for store in compressed_layers(cache)] == [[[25, 25]]] * 4
    for position, key in zip(*first_head(cache), strict=True):
        if position < 30:
            assert torch.equal(key, before[position] * second)
            assert torch.equal(key != 0, first & second)
        else:
            assert torch.equal(key != 0, second)


def first_head(cache):
    rows = compressed_layers(cache)[0].snapshot.rows()
    return rows.text_positions()[0, 0].tolist(), rows.keys[0, 0]


def test_turns_of_different_lengths_change_nothing():
    model, press = tiny(), ComposedPress([SNAP, THINK])
    first = [tokens(n, seed=n) for n in (31, 18)]
    second = [tokens(n, seed=n) for n in (3, 14)]
    batch, _ = two_turns(model, press, first, second)
    for i in range(2):
        alone, _ = two_turns(model, press, first[i : i + 1], second[i : i + 1])
        for ours, wanted in zip(stored(batch), stored(alone), strict=True):
            assert torch.equal(ours[i], wanted[0])


def test_a_sequence_without_a_query_keeps_its_channels():
    model = tiny()
    texts = [tokens(20, seed=1), tokens(20, seed=2)]
    cache, mask = DynamicCache(), torch.ones(2, 24, dtype=torch.long)
    mask[0, 20:] = 0
    with THINK(model):
        forward(model, cache, input_ids=torch.cat(texts))
        before = stored(cache)
        forward(model, cache, input_ids=tokens(4, batch=2), attention_mask=mask)
    for was, now in zip(before, stored(cache), strict=True):
        assert torch.equal(was[0], now[0])


def test_while_decoding_the_press_behind_it_says_which_pairs_stay():
    model, ids = tiny(), tokens(30)
    thin = ComposedPress([THINK, cp.StreamingLLMPress()])
    cache, plain = DynamicCache(), DynamicCache()
    with cp.DecodingPress(thin, 4, 16)(model):
        forward(model, cache, input_ids=ids)
        for step in range(8):
            forward(model, cache, input_ids=tokens(1, seed=step))
    with cp.DecodingPress(cp.StreamingLLMPress(), 4, 16)(model):
        forward(model, plain, input_ids=ids)
        for step in range(8):
            forward(model, plain, input_ids=tokens(1, seed=step))
    assert kept(cache) == kept(plain)
    assert [int(x.sum()) for x in stored(cache)] == [8] * 4
    alone = DynamicCache()
    with cp.DecodingPress(THINK, 4, 16)(model):
        forward(model, alone, input_ids=ids)
    assert kept(alone) == [[[list(range(14, 30))] * 2]] * 4


def test_a_bound_on_bytes_holds():
    model, limit = single(), 60_000
    for inner in (SNAP, cp.AdaKVPress(SNAP)):
        bounded = cp.SnapKVPress(window_size=6, max_bytes=limit)
        press = bounded if inner is SNAP else cp.AdaKVPress(bounded)
        cache = pressed(model, ComposedPress([press, THINK]), tokens(400))
        whole = pressed(model, press, tokens(400))
        assert cp.size_of(cache).bytes_after < cp.size_of(whole).bytes_after <= limit


def test_bf16_is_scored_in_float32():
    model = tiny().bfloat16()
    cache = pressed(model, THINK, tokens(30))
    assert compressed_layers(cache)[0].keys.dtype == torch.bfloat16
    assert int(stored(cache)[0].sum()) == 8


def test_the_spelling_and_bad_options():
    press = ThinKPress(0.25, 16)
    assert repr(press) == "ThinKPress(key_channel_compression_ratio=0.25, window_size=16)"
    assert cp.parse(repr(press)) == press == cp.parse("think(0.25, 16)")
    assert press.with_ratio(0.75) == ThinKPress(0.75, 16)
    for bad in (1, 1.0, -0.5, None, "x", True):
        with pytest.raises(cp.CachepressError, match="key_channel_compression_ratio: got"):
            ThinKPress(bad)
    with pytest.raises(cp.CachepressError, match="window_size: got 0, wanted"):
        ThinKPress(0.5, 0)
