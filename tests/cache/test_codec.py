"""Quantized rows: how far off they are, what they cost, and that forks and turns work on them."""

import pickle

import pytest
import torch

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.cache.codec import Codec, Quantized
from tests.bounds import close, half_a_step, near, rounding
from tests.tiny import exact_tiny, tiny, tokens
from tests.tiny_cache import allocated, forward, kept

PRESS = cp.AdaKVPress(cp.KnormPress(0.5))


HALF = torch.finfo(torch.float16)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_numbers_are_off_by_half_a_step_at_most(bits):
    pages = (
        torch.randn(5, 32, 16)
        * torch.tensor([0.01, 1.0, 100.0, 0.0])[:, None].repeat(1, 4).flatten()
    )
    used = torch.ones(5, 32, dtype=torch.bool)
    used[4, 3:] = False
    keys = Codec(bits).encode_keys(pages, used).decode()
    for page, rows, ours in zip(pages, used, keys, strict=True):
        assert ((ours - page)[rows].abs() <= half_a_step(page[rows], 0, bits)).all()
    values = Codec(bits).encode_values(pages).decode()
    assert ((values - pages).abs() <= half_a_step(pages, -1, bits)).all()


@pytest.mark.parametrize("size", [80, 32, 8])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_groups_of_channels_have_a_scale_each(bits, size):
    pages = torch.randn(3, 32, size) * torch.linspace(0.1, 9, size)
    made = Codec(bits, value_group=32).encode_values(pages)
    groups = [slice(i, min(i + 32, size)) for i in range(0, size, 32)]
    assert made.scale.shape == (3, 32, len(groups))
    assert made.codes.shape == (3, 32, size * bits // 8) and made.codes.dtype == torch.uint8
    ours, steps = made.decode(), 2**bits - 1
    for some in groups:
        part = pages[..., some]
        low = part.amin(-1, keepdim=True).half().float()
        step = ((part.amax(-1, keepdim=True) - low) / steps).half().float()
        wanted = low + ((part - low) / step).round().clamp(0, steps) * step
        near(ours[..., some], wanted, torch.float32, terms=2)


def test_two_bits_are_four_numbers_a_byte():
    codes = torch.tensor([[[0, 1, 2, 3, 3, 2, 1, 0]]], dtype=torch.uint8).expand(1, 32, 8)
    made = Codec(2).encode_values(codes.float() * 10 - 5)
    assert made.codes[0, 0].tolist() == [0b11100100, 0b00011011]
    assert torch.equal(made.decode(), codes.float() * 10 - 5)
    with pytest.raises(cp.CachepressError, match="int2 storage packs 4 channels.*got 6 channels"):
        Codec(2).encode_values(torch.zeros(1, 32, 6))


@pytest.mark.parametrize("size", [1.0, 1e5, 1e-7])
@pytest.mark.parametrize("codec", [Codec(8), Codec(4, value_group=32), Codec(2, value_group=32)])
def test_the_bytes_of_a_row_are_those_that_are_stored(codec, size):
    pages, used = size * torch.randn(4, 32, 80), torch.ones(4, 32, dtype=torch.bool)
    held = [*codec.encode_keys(pages, used).tensors(), *codec.encode_values(pages).tensors()]
    assert codec.pair_bytes(pages, pages) * 4 * 32 == sum(x.nbytes for x in held)
    assert held[1].dtype == (torch.float16 if size == 1 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [7e4, 1e38, 1e-7, 1e-30])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_numbers_of_any_size_are_off_by_half_a_step_at_most(bits, size, dtype):
    generator = torch.Generator().manual_seed(bits)
    pages = (size * (torch.rand(3, 32, 16, generator=generator) * 2 - 1)).to(dtype)
    used = torch.ones(3, 32, dtype=torch.bool)
    # The lowest number and the step are float32, and so is what is made of them; then comes dtype.
    off = 3 * rounding(torch.float32, 1) * size + rounding(dtype, 1) / 2 * size
    for dim, made in (
        (1, Codec(bits).encode_keys(pages, used)),
        (2, Codec(bits).encode_values(pages)),
    ):
        exact = pages.double()
        step = (exact.amax(dim, keepdim=True) - exact.amin(dim, keepdim=True)) / (2**bits - 1)
        assert ((made.decode().double() - exact).abs() <= step / 2 + off).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_largest_numbers_of_float16_stay_finite(bits):
    pages = torch.tensor([65504.0, -65504.0, 1.0, 0.0] * 8).half().expand(1, 32, 32)
    decoded = Codec(bits).encode_values(pages).decode().float()
    half = 65504 / (2**bits - 1)
    # What is half of a step off is rounded to float16 there.
    limit = half * (1 + HALF.eps) + 3 * rounding(torch.float32, 1) * 65504
    assert (decoded - pages.float()).abs().max() <= limit


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), float("-inf"), 1e38])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_what_is_no_number_harms_no_other_row(bits, damage):
    pages, used = torch.randn(2, 32, 8), torch.ones(2, 32, dtype=torch.bool)
    hurt = pages.clone()
    hurt[1, 7] = damage
    values = Codec(bits).encode_values(hurt).decode()
    others = torch.arange(32) != 7
    assert ((values - pages).abs() <= half_a_step(pages, -1, bits))[:, others].all()
    keys = Codec(bits).encode_keys(hurt, used).decode()
    assert keys.isfinite().all() and values.isfinite().all()
    if abs(damage) != 1e38:
        assert ((keys - pages).abs() <= half_a_step(pages, 1, bits))[:, others].all()


def test_pages_with_scales_of_both_types_are_joined():
    """Decoded rows that are beyond float16 come behind compressed ones that are not."""
    model = tiny()
    cache = cp.prefill(model, tokens(100), PRESS, storage=cp.Codec(8, residual=5))
    store = compressed_layers(cache)[0]
    assert store.snapshot.rows().keys.isfinite().all()
    large = torch.full((1, 2, 40, 8), 1e6) + torch.randn(1, 2, 40, 8)
    for part in large.split(1, dim=2):
        store.update(part, part)
    store.update(torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8))
    store.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
    rows = store.snapshot.rows()
    column = (rows.text_positions()[0, 0] >= 100) & (rows.text_positions()[0, 0] < 132)
    wanted = large[0, 0, :32]
    step = (wanted.amax(-1) - wanted.amin(-1)) / 255
    limit = step / 2 + 2 * rounding(torch.float32, terms=1) * 1e6
    assert ((rows.values[0, 0, column] - wanted).abs().amax(-1) <= limit).all()
    old = rows.text_positions()[0, 0] < 100
    assert rows.values[0, 0, old].abs().max() < 100
    assert store.nbytes == allocated(store)


def test_what_the_device_was_asked_ahead_is_forgotten_with_the_tokens():
    cache = cp.prefill(tiny(), tokens(93), PRESS, storage=cp.Codec(8, residual=5))
    store = compressed_layers(cache)[0]
    for size, n in ((1.0, 33), (1e6, 15)):
        for _ in range(n):
            store.update(*(size * torch.randn(1, 2, 1, 8) for _ in range(2)))
        if size == 1:
            assert store._tail.asked[0] == 32 and pickle.loads(pickle.dumps(store._tail.asked[1]))
            store.crop(-5)  # Of the 32 tokens that were asked for four are gone.
    newest = store.snapshot.segments[-1]
    assert newest.layout.even == 32 and newest.values.scale.dtype == torch.float32
    assert newest.values.decode().abs().amax() > 1e5


@pytest.mark.parametrize("storage", ["int8", "int4", "int2"])
def test_a_number_of_bytes_holds_whatever_the_scales(storage):
    model = tiny()
    model.model.layers[2].self_attn.v_proj.weight.data *= 1e6
    limit = 110_000
    cache = cp.prefill(model, tokens(500), cp.KnormPress(max_bytes=limit), storage=storage)
    assert compressed_layers(cache)[2].snapshot.segments[0].values.scale.dtype == torch.float32
    assert 0.4 * limit < cp.size_of(cache).bytes_after <= limit


def test_keys_know_the_bounds_of_their_pages():
    pages, used = torch.randn(4, 32, 8), torch.ones(4, 32, dtype=torch.bool)
    used[3, 5:] = False
    made = Codec(4).encode_keys(pages, used)
    low, high = made.bounds().unbind(1)
    for page, rows, least, most in zip(made.decode(), used, low, high, strict=True):
        assert torch.equal(page[rows].amin(0), least) and torch.equal(page[rows].amax(0), most)


def test_int2_is_two_bits_with_groups_of_values():
    assert Codec.of("int2") == Codec(2, value_group=32)
    assert Codec.of("int4") == Codec(4) and Codec.of("full") is None


@pytest.mark.parametrize(("storage", "most"), [("int8", 0.40), ("int4", 0.27), ("int2", 0.21)])
def test_bytes_are_measured_and_small(storage, most):
    model, ids = tiny(), tokens(500)
    full = cp.prefill(model, ids, cp.KnormPress(0.0))
    small = cp.prefill(model, ids, cp.KnormPress(0.0), storage=storage)
    held = [cp.size_of(cache).bytes_after for cache in (small, full)]
    assert held == [allocated(compressed_layers(cache)) for cache in (small, full)]
    # Small heads (8 channels) make the positions weigh more than they do in a real model.
    positions = 4 * 4 * 2 * 512
    assert (held[0] - positions) / (held[1] - positions) < most + 64 / 500
    assert compressed_layers(small)[0].lengths.tolist() == [[500, 500]]


def plain(cache, seen):
    """A cache of the first ``seen`` text columns, with the same numbers, not in few bits."""
    copied = cp.fork(cache)
    for store in compressed_layers(copied):
        rows = store.snapshot.rows()
        where = rows.text_positions()
        store.codec, store._seen = None, seen
        store.keep(rows, (where >= 0) & (where < seen), store.text_valid)
    return copied


STORAGES = ["int8", "int2", Codec(8, residual=0), Codec(8, residual=300), Codec(4, residual=5)]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_token_reads_the_numbers_that_are_stored(storage):
    """How far those are off what was written is a matter of half a step, see ``test_store``."""
    model, ids = exact_tiny(), tokens(300)
    full, small = (cp.prefill(model, ids, PRESS, storage=s) for s in ("full", storage))
    assert kept(small) == kept(full)
    for step in range(150):
        token = tokens(1, seed=step)
        ours = forward(model, small, input_ids=token).logits
        if not step % 6:
            wanted = forward(model, plain(small, 300 + step), input_ids=token).logits
            close(ours, wanted)
    assert compressed_layers(small)[0].lengths.sum() == 2 * 300


def test_decoded_rows_are_quantized_once_the_residual_is_full():
    model = tiny()
    cache = cp.prefill(model, tokens(100), PRESS, storage=Codec(4, residual=16))
    for step in range(150):
        forward(model, cache, input_ids=tokens(1, seed=step))
    store = compressed_layers(cache)[0]
    assert store._tail.n < 16 + 32 + 1
    assert store.lengths.sum() == 2 * 200
    whole = cp.prefill(model, tokens(100), PRESS)
    for step in range(150):
        forward(model, whole, input_ids=tokens(1, seed=step))
    assert allocated(store) < 0.75 * allocated(compressed_layers(whole)[0])


def test_forks_share_quantized_rows_and_a_second_turn_is_compressed():
    model, ids = exact_tiny(), tokens(200)
    cache = cp.prefill(model, ids, PRESS, storage="int4")
    one, three = cp.fork(cache), cp.fork(cache, 3)
    step = tokens(3, seed=1)
    wanted = forward(model, cache, input_ids=step).logits
    close(forward(model, one, input_ids=step).logits, wanted)
    batch = forward(model, three, input_ids=step.expand(3, -1)).logits
    close(batch, wanted.expand(3, -1, -1))
    with PRESS(model):
        forward(model, one, input_ids=tokens(97))
    assert compressed_layers(one)[0].lengths.sum() == 2 * 150
    assert compressed_layers(one)[0].codec == Codec(4)


@pytest.mark.parametrize("bad", ["int3", "", 4])
def test_an_unknown_storage_is_refused(bad):
    with pytest.raises(cp.CachepressError, match="storage: got"):
        PRESS(tiny(), storage=bad)


def test_a_codec_checks_what_it_is_given():
    with pytest.raises(cp.CachepressError, match="bits: got 3"):
        Codec(3)
    with pytest.raises(cp.CachepressError, match="residual: got -1"):
        Codec(8, -1)
    with pytest.raises(cp.CachepressError, match="value_group: got 0"):
        Codec(8, value_group=0)
    with pytest.raises(cp.CachepressError, match="got 7 channels"):
        Codec(4).encode_values(torch.zeros(1, 32, 7))


@pytest.mark.parametrize("storage", ["full", Codec(8, residual=8)])
def test_a_padded_batch_decodes_past_forks_and_encoded_tails(storage):
    """Segments made after the compression hold columns that the mask of the prompt lacks."""
    model, ids = exact_tiny(), tokens(60, batch=2)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :21] = 0
    cache = cp.prefill(model, ids, PRESS, attention_mask=mask, storage=storage)
    alone = cp.prefill(model, ids[:1, 21:], PRESS, storage=storage)
    for step in range(90):
        if step == 80:
            cache = cp.fork(cache)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        token = tokens(1, seed=step)
        both = forward(
            model,
            cache,
            input_ids=token.expand(2, -1),
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
        ).logits
        one = forward(model, alone, input_ids=token).logits
        # The same rows in pages of the same rows have the same codes.
        close(both[0], one[0])
    assert len(compressed_layers(cache)[0]._segments) > 1


def test_scales_beyond_float16_are_saved_and_read(tmp_path):
    model = tiny()
    model.model.layers[1].self_attn.v_proj.weight.data *= 1e6
    cache = cp.prefill(model, tokens(150), cp.KnormPress(0.0), storage="int4")
    cp.save_cache(cache, tmp_path / "cache.safetensors", model)
    loaded = cp.load_cache(tmp_path / "cache.safetensors", model)
    for store, again in zip(compressed_layers(cache), compressed_layers(loaded), strict=True):
        assert torch.equal(store.values, again.values) and store.values.isfinite().all()
        assert store.nbytes == again.nbytes
    assert compressed_layers(loaded)[1].snapshot.segments[0].values.scale.dtype == torch.float32
    assert compressed_layers(loaded)[1].values.abs().max() > 65504


def test_pages_of_another_storage_follow_those_that_are_there():
    model = tiny()
    cache = cp.prefill(model, tokens(100), PRESS, storage="int8")
    for step in range(260):
        if step == 130:
            for store in compressed_layers(cache):
                store.codec = Codec.of("int4")
        forward(model, cache, input_ids=tokens(1, seed=step))
    bits = [
        x.keys.bits
        for x in compressed_layers(cache)[0].snapshot.segments
        if isinstance(x.keys, Quantized)
    ]
    assert bits == [8, 4] and int(compressed_layers(cache)[0].lengths.sum()) == 2 * 310


def test_a_group_wider_than_a_value_costs_no_memory():
    pages = torch.randn(2, 32, 8)
    found = Codec(4, value_group=10**7).encode_values(pages)
    assert found.scale.shape == (2, 32, 1)
    assert (found.decode() - pages).abs().max() <= found.scale.max()
