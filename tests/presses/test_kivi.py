"""KIVI: what is stored is what a transcription of its rule stores, and costs what it says."""

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.presses.kivi import KIVIPress
from tests.bounds import close
from tests.tiny import exact_tiny as tiny
from tests.tiny import tiny as single
from tests.tiny import tokens
from tests.tiny_cache import allocated, forward, kept, pressed


def rounded(x, dim, bits):
    """Numbers rounded to 2**bits levels between the least and the most along a dimension.

    In float32 throughout, as it is stored: otherwise a last bit differs where a step is tiny.
    """
    x = x.float()
    low = x.amin(dim, keepdim=True).half().float()
    step = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).half().float()
    return (low + ((x - low) / step).round().clamp(0, 2**bits - 1) * step).double()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_keys_are_rounded_by_channel_and_values_by_token(bits):
    model, ids = tiny(), tokens(150)
    cache = cp.prefill(model, ids, KIVIPress(cp.KnormPress(0.0), bits, residual=20))
    whole = cp.prefill(model, ids)
    for store, layer in zip(compressed_layers(cache), whole.layers, strict=True):
        rows, n = store.snapshot.rows(), 150 - 20
        assert rows.text_positions()[0, 0].tolist() == list(range(150))
        keys = layer.keys[:, :, :n].split(32, dim=2)
        keys = torch.cat([rounded(page, 2, bits) for page in keys], dim=2)
        values = rounded(layer.values[:, :, :n], -1, bits)  # 8 channels are less than a group.
        close(rows.keys[:, :, :n], keys)
        close(rows.values[:, :, :n], values)
        assert torch.equal(rows.keys[:, :, n:], layer.keys[:, :, n:])
        assert torch.equal(rows.values[:, :, n:], layer.values[:, :, n:])


@pytest.mark.parametrize(
    "inner",
    [
        cp.AdaKVPress(cp.SnapKVPress(0.5, window_size=6)),
        cp.AdaKVPress(cp.KnormPress(0.5), scope="model"),
        cp.KeyRerotationPress(cp.KnormPress(0.5)),
    ],
    ids=repr,
)
def test_any_eviction_keeps_its_pairs(inner):
    """And a wrapper around it stores in few bits as well."""
    ids = tokens(90)
    wanted = kept(pressed(tiny(), inner, ids))
    cache = pressed(tiny(), KIVIPress(inner, 4, residual=16), ids)
    assert kept(cache) == wanted
    assert compressed_layers(cache)[0].codec == cp.Codec(4, 16, value_group=32)
    outside = pressed(tiny(), cp.AdaKVPress(KIVIPress(cp.KnormPress(0.5), 4, 16)), ids)
    assert compressed_layers(outside)[0].codec == cp.Codec(4, 16, value_group=32)
    composed = cp.ComposedPress([KIVIPress(cp.KnormPress(0.5), 4, 16), cp.KnormPress(0.5)])
    assert compressed_layers(pressed(tiny(), composed, ids))[0].codec == cp.Codec(
        4, 16, value_group=32
    )


def test_bytes_are_measured_and_small():
    ids = tokens(500)
    full = cp.prefill(single(), ids, cp.KnormPress(0.0))
    small = cp.prefill(single(), ids, KIVIPress(cp.KnormPress(0.0), residual=32))
    size = cp.size_of(small)
    assert size.bytes_after == allocated(compressed_layers(small)) < size.bytes_before
    assert (size.pairs_held, size.pairs_seen) == (4 * 2 * 500, 4 * 2 * 500)
    pages, spans = 15, 4 * 2  # 468 pairs of 8 + 8 channels at 2 bits, and a page as it was.
    quantized = pages * (32 * (4 + 4 + 4) + 8 * 4)
    assert size.bytes_after == spans * (quantized + 32 * (64 + 4))
    assert size.bytes_after < 0.35 * cp.size_of(full).bytes_after


@pytest.mark.parametrize("limit", [60_000, 80_000])
@pytest.mark.parametrize("adaptive", [False, True])
def test_as_many_pairs_as_fit_into_a_number_of_bytes(limit, adaptive):
    inner = cp.KnormPress(max_bytes=limit)
    inner = cp.AdaKVPress(inner) if adaptive else inner
    cache = cp.prefill(single(), tokens(450), KIVIPress(inner, residual=8))
    held = allocated(compressed_layers(cache))
    # An even number of pairs is a number of pages, and room is left for one page of the residual.
    assert 0.55 * limit < held <= limit
    wider = cp.prefill(single(), tokens(450), inner)
    assert cp.size_of(wider).pairs_held < cp.size_of(cache).pairs_held


def test_decoded_pairs_are_quantized_and_decoding_goes_on_after_the_context():
    model, press = tiny(), KIVIPress(cp.KnormPress(0.5), bits=8, residual=8)
    cache, plain = (pressed(model, p, tokens(60)) for p in (press, press.press))
    told = cp.prefill(model, tokens(60), press.press, storage=cp.Codec(8, 8, value_group=32))
    for step in range(100):
        token = tokens(1, seed=step)
        ours = forward(model, cache, input_ids=token).logits
        assert torch.equal(ours, forward(model, told, input_ids=token).logits)
        forward(model, plain, input_ids=token)
    assert compressed_layers(cache)[0]._tail.n <= 8 + 32
    assert (
        allocated(compressed_layers(cache))
        == allocated(compressed_layers(told))
        < allocated(compressed_layers(plain))
    )


def test_a_sequence_of_a_padded_batch_is_stored_as_if_alone():
    press, texts = KIVIPress(cp.KnormPress(0.3), residual=10), [tokens(n, seed=n) for n in (90, 51)]
    ids = torch.zeros(2, 90, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[90 - text.shape[1] :] = text[0]
    cache = cp.prefill(tiny(), ids, press, attention_mask=(ids > 0).long())
    for b, text in enumerate(texts):
        alone = cp.prefill(tiny(), text, press)
        for ours, wanted in zip(compressed_layers(cache), compressed_layers(alone), strict=True):
            ours, wanted = ours.snapshot.rows(), wanted.snapshot.rows()
            some = ours.text_positions()[b] >= 0
            close(ours.values[b][some], wanted.values.flatten(0, 2))


def test_a_decoding_press_inside_and_outside():
    inner = cp.DecodingPress(cp.KnormPress(), 8, 40)
    outer = cp.DecodingPress(KIVIPress(cp.KnormPress(), 4, 8), 8, 40)
    for press in (KIVIPress(inner, 4, 8), outer):
        cache, model = DynamicCache(), tiny()
        with press(model):
            forward(model, cache, input_ids=tokens(60))
            for step in range(9):
                forward(model, cache, input_ids=tokens(1, seed=step))
        assert compressed_layers(cache)[0].lengths.tolist() == [[41, 41]]
        assert compressed_layers(cache)[0].codec == cp.Codec(4, 8, value_group=32)


def test_two_answers_to_one_question_are_refused():
    press, model = KIVIPress(cp.KnormPress(0.5)), tiny()
    for storage in ("int8", cp.Codec(4)):
        with pytest.raises(cp.CachepressError, match="says how pairs are stored: got storage="):
            press(model, storage=storage)
        with pytest.raises(cp.CachepressError, match="says how pairs are stored: got storage="):
            cp.prefill(model, tokens(9), cp.AdaKVPress(press), storage=storage)
    with pytest.raises(cp.CachepressError, match="does so already: keep one"):
        KIVIPress(cp.AdaKVPress(press))
    with pytest.raises(cp.CachepressError, match="more than one of the presses says"):
        cp.ComposedPress([press, press])


def test_the_spelling_and_bad_options():
    press = KIVIPress(cp.KnormPress(0.5))
    assert repr(press) == (
        "KIVIPress(press=KnormPress(compression_ratio=0.5), bits=2, residual=128)"
    )
    assert cp.parse(repr(press)) == press == cp.parse("kivi(knorm(0.5))")
    assert press.with_ratio(0.25).compression_ratio == 0.25
    for bad, name in (({"bits": 3}, "bits"), ({"residual": -1}, "residual")):
        with pytest.raises(cp.CachepressError, match=f"{name}: got"):
            KIVIPress(cp.KnormPress(0.5), **bad)
