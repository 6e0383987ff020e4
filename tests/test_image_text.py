"""The text decoder of an image-text model is pressed like any other, image tokens included."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.hf import text_decoder
from tests.bounds import near
from tests.pictures import MODELS, SECTIONS, Inputs, gemma3, llama4, llava, made
from tests.tiny_cache import forward

OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
SLIDING = (gemma3, llama4)
KEPT: dict[int, Tensor] = {}
"""Which text columns of the prompt each KV head keeps, ``[H, T]``, by layer."""
each_model = pytest.mark.parametrize("make", MODELS)


def _masked_attention(module, query, key, value, attention_mask, **kwargs):
    """Attention of sdpa that sees no evicted pair of the prompt."""
    kept = KEPT.get(module.layer_idx)
    n, t = query.shape[2], key.shape[2]
    if kept is not None and t > kept.shape[1]:
        seen = torch.ones(kept.shape[0], t, dtype=torch.bool)
        seen[:, : kept.shape[1]] = kept
        seen = seen.repeat_interleave(query.shape[1] // len(seen), 0)[None, :, None]
        if attention_mask is None:
            attention_mask = torch.ones(1, 1, n, t, dtype=torch.bool).tril(t - n)
        if attention_mask.dtype != torch.bool:
            attention_mask = attention_mask == 0
        attention_mask = attention_mask & seen
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("masked_by_a_compressed_cache", _masked_attention)
AttentionMaskInterface.register(
    "masked_by_a_compressed_cache", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
)


@contextmanager
def evicted(model: PreTrainedModel, cache: DynamicCache) -> Iterator[None]:
    """Let a model see of the prompt what a compressed cache holds of it."""
    for i, layer in enumerate(cache.layers):
        if layer in compressed_layers(cache):
            kept = torch.zeros(layer.positions.shape[1], layer.get_seq_length(), dtype=torch.bool)
            for row, positions in zip(kept, layer.positions[0].tolist(), strict=True):
                row[[p for p in positions if p >= 0]] = True
            KEPT[i] = kept
    text_decoder(model).set_attn_implementation("masked_by_a_compressed_cache")
    try:
        yield
    finally:
        text_decoder(model).set_attn_implementation("sdpa")
        KEPT.clear()


def read(model, inputs: Inputs, press: cp.BasePress | None) -> tuple[Tensor, DynamicCache]:
    cache = DynamicCache(config=model.config)
    if press is None:
        return forward(model, cache, **inputs).logits, cache
    with press(model):
        return forward(model, cache, **inputs).logits, cache


def continued(model, ids: Tensor, cache: DynamicCache) -> Tensor:
    """Logits of three steps of ``generate`` after a further turn of the given tokens."""
    whole = torch.cat([ids, torch.tensor([[7, 11, 23, 5]])], 1)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(whole, past_key_values=cache, output_logits=True, **options)
    return torch.stack(found.logits)


@each_model
def test_nothing_evicted_is_no_press(make):
    model, inputs = made(make)
    wanted, whole = read(model, inputs, None)
    ours, cache = read(model, inputs, cp.KeyDiffPress(0.0))
    assert torch.equal(ours, wanted)
    after = (continued(model, inputs["input_ids"], kept) for kept in (cache, whole))
    near(*after, torch.float32, 1)  # generate() gives float32, whatever the model computes in


@each_model
def test_generate_without_eviction_gives_the_same_tokens(make):
    model, inputs = made(make)
    wanted = model.generate(**inputs, **OPTIONS)
    with cp.KnormPress(0.0)(model):
        assert torch.equal(model.generate(**inputs, **OPTIONS), wanted)


@each_model
@pytest.mark.parametrize("press", [cp.KeyDiffPress(0.5), cp.AdaKVPress(cp.KnormPress(0.5))])
def test_a_further_turn_is_that_of_the_whole_cache_without_what_was_evicted(make, press):
    model, inputs = made(make)
    ids = inputs["input_ids"]
    wanted, whole = read(model, inputs, None)
    ours, cache = read(model, inputs, press)
    assert torch.equal(ours, wanted)
    held = compressed_layers(cache)
    assert len(held) == (1 if make in SLIDING else 2)
    assert {int(layer.lengths.sum()) for layer in held} == {2 * (ids.shape[1] // 2)}
    found = continued(model, ids, cp.fork(cache))
    with evicted(model, cache):
        near(found, continued(model, ids, whole), torch.float32, 100)


@each_model
def test_generate_with_a_picture_compresses_the_decoder_and_nothing_else(make):
    model, inputs = made(make)
    seen = inputs["input_ids"].shape[1]
    options = {**OPTIONS, "return_dict_in_generate": True, "output_logits": True}
    with cp.SnapKVPress(0.5, window_size=8)(model):
        found = model.generate(**inputs, **options)
    cache = found.cache if hasattr(found, "cache") else found.past_key_values
    lengths = {int(n) for layer in compressed_layers(cache) for n in layer.lengths.flatten()}
    assert lengths == {seen // 2 + 3}
    plain = model.generate(**inputs, **options).logits[0]
    assert torch.equal(found.logits[0], plain)


@each_model
def test_a_loaded_cache_goes_on_as_before(make, tmp_path):
    model, inputs = made(make)
    _, cache = read(model, inputs, cp.KnormPress(0.5))
    cp.save_cache(cache, tmp_path / "cache", model)
    wanted = continued(model, inputs["input_ids"], cp.fork(cache))
    other, _ = made(make)
    loaded = cp.load_cache(tmp_path / "cache", other)
    assert torch.equal(continued(other, inputs["input_ids"], loaded), wanted)


@pytest.mark.parametrize("make", [llava, *SECTIONS])
def test_a_picture_cannot_be_repeated(make):
    model, inputs = made(make)
    with pytest.raises(cp.CachepressError, match=r"give input_ids, not embeddings or pictures$"):
        read(model, inputs, cp.KVComposePress(0.5))


@pytest.mark.parametrize("make", SECTIONS)
def test_positions_in_sections_are_refused_where_they_would_have_to_be_undone(make):
    model, inputs = made(make)
    with pytest.raises(cp.UnsupportedError, match="needs the position embedding of layer 0 of"):
        read(model, inputs, cp.ExpectedAttentionPress(0.5))


@pytest.mark.parametrize("make", SECTIONS)
@pytest.mark.parametrize("size", [None, 5])
def test_a_text_is_read_at_the_positions_of_its_own_cache(make, size):
    model, inputs = made(make)
    fresh, _ = made(make)
    text, turn = inputs["input_ids"][:, 10:], torch.tensor([[7, 11, 23, 5, 9, 31, 40]])
    _, with_picture = read(model, inputs, None)
    wanted = cp.fork(with_picture)
    forward(model, wanted, input_ids=turn)
    ours, theirs = (cp.prefill(m, text, None, chunk_size=size) for m in (model, fresh))
    assert torch.equal(continued(model, text, ours), continued(fresh, text, theirs))
    _, pressed = read(model, inputs, cp.KnormPress(0.0))
    cp.prefill(model, text, None)  # The model has read another text since.
    cp.prefill(model, turn, None, pressed, chunk_size=size)
    for one, other in zip(pressed.layers, wanted.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-9, rtol=0)
