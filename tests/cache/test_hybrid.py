"""A compressed layer with a recurrent state beside its pairs."""

import pytest
import torch
import transformers as hf

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.cache.hybrid import CompressedHybridLayer
from cachepress.hf import has_only_full_attention
from tests.bounds import near
from tests.tiny import tokens
from tests.tiny_cache import forward, pressed

PRESS = cp.KeyDiffPress(0.5)
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
MAMBA |= {"mamba_n_groups": 1, "mamba_chunk_size": 16, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def model() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return hf.FalconH1ForCausalLM(hf.FalconH1Config(**SMALL, **MAMBA, **ids)).eval()


def state(layer) -> list[torch.Tensor]:
    """The tensors of the recurrent state, of one version of transformers or another."""
    found = [vars(layer)[name] for name in ("conv_states", "recurrent_states")]
    return [x for y in found for x in (y.values() if isinstance(y, dict) else (y,))]


def test_pairs_are_evicted_and_the_state_is_that_of_the_whole_text(model):
    ids, plain = tokens(40), hf.DynamicCache(config=model.config)
    forward(model, plain, input_ids=ids)
    cache = pressed(model, PRESS, ids)
    layers = compressed_layers(cache)
    assert [type(layer) for layer in layers] == [CompressedHybridLayer] * 2
    assert [layer.lengths.tolist() for layer in layers] == [[[20, 20]]] * 2
    for ours, wanted in zip(layers, plain.layers, strict=True):
        assert ours.get_seq_length() == 40
        for x, y in zip(state(ours), state(wanted), strict=True):
            assert torch.equal(x, y)


def test_a_cache_that_was_filled_before_goes_on(model):
    ids, cache = tokens(40), hf.DynamicCache(config=model.config)
    forward(model, cache, input_ids=ids[:, :25])
    plain = hf.DynamicCache(config=model.config)
    forward(model, plain, input_ids=ids[:, :25])
    with cp.KeyDiffPress(0.0)(model):
        ours = forward(model, cache, input_ids=ids[:, 25:]).logits
    near(ours, forward(model, plain, input_ids=ids[:, 25:]).logits, torch.float32, 300, 2)


def test_a_fork_has_a_state_of_its_own(model):
    cache, step = pressed(model, PRESS, tokens(40)), tokens(1, seed=3)
    before = [x.clone() for layer in cache.layers for x in state(layer)]
    forked = cp.fork(cache, 2)
    two = forward(model, forked, input_ids=step.repeat(2, 1)).logits
    after = [x for layer in cache.layers for x in state(layer)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    one = forward(model, cache, input_ids=step).logits
    near(two, one.repeat(2, 1, 1), torch.float32, 300, 2)


def test_it_is_saved_and_loaded(model, tmp_path):
    cache, step = pressed(model, PRESS, tokens(40)), tokens(1, seed=3)
    cp.save_cache(cache, tmp_path / "cache", model)
    loaded = cp.load_cache(tmp_path / "cache", model)
    assert [type(layer) for layer in loaded.layers] == [CompressedHybridLayer] * 2
    ours, wanted = (forward(model, c, input_ids=step).logits for c in (loaded, cache))
    assert torch.equal(ours, wanted)


def test_it_is_reset(model):
    cache = pressed(model, PRESS, tokens(40))
    wanted = forward(model, hf.DynamicCache(config=model.config), input_ids=tokens(9)).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    near(forward(model, cache, input_ids=tokens(9)).logits, wanted, torch.float32, 300, 2)


def test_a_state_that_cannot_be_put_back_is_not_cropped(model):
    cache = pressed(model, PRESS, tokens(40))
    forward(model, cache, input_ids=tokens(3))
    with pytest.raises(cp.UnsupportedError, match="cannot crop 1 tokens.*recurrent state"):
        cache.layers[0].crop(-1)
    with pytest.raises(cp.UnsupportedError, match="cannot crop 13 tokens"):
        cache.layers[0].crop(30)
    cache.layers[0].crop(43)
    assert not cache.layers[0].is_croppable
    assert cache.get_seq_length() == 43


def test_states_of_several_caches_are_not_joined(model):
    assert not has_only_full_attention(model)
    with pytest.raises(cp.UnsupportedError, match="recurrent states"):
        pressed(model, PRESS, tokens(40)).layers[0].form()
