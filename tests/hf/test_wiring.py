"""The parts of a model are found whatever they are called, and whatever wraps them."""

import pytest
import torch
import transformers as hf
from torch import nn

import cachepress as cp
from cachepress.hf import text_decoder
from tests.test_image_text import MODELS, made
from tests.tiny import ARCHITECTURES, exact_tiny, tiny, tokens
from tests.tiny_cache import kept, pressed

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


class Wrapped(nn.Module):
    """What ``peft.PeftModel`` is to its model: a module around it that answers for it."""

    def __init__(self, model: hf.PreTrainedModel) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.get_base_model(), name)

    def get_base_model(self) -> hf.PreTrainedModel:
        return super().__getattr__("base_model")["model"]

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.get_base_model()(*args, **kwargs)


def modernbert() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    ids |= {"cls_token_id": 1, "sep_token_id": 2, "vocab_size": 97}
    config = hf.ModernBertDecoderConfig(**SMALL, **ids, num_hidden_layers=4, local_attention=16)
    return hf.ModernBertDecoderForCausalLM(config).eval()


def blt() -> hf.PreTrainedModel:
    small = {**SMALL, "num_hidden_layers": 1, "num_key_value_heads": 4}
    part = {**small, "vocab_size": 260, "cross_attn_k": 1, "hidden_size_global": 32}
    parts = {"encoder_config": part, "decoder_config": part, "global_config": small}
    parts["patcher_config"] = {**small, "vocab_size": 260}
    config = hf.BltConfig(vocab_size=260, encoder_hash_byte_group_vocab=50, **parts)
    return hf.BltForCausalLM(config).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_decoder_is_the_module_that_fills_the_cache(name):
    model = tiny(name)
    assert text_decoder(model) is text_decoder(text_decoder(model)) is model.base_model


@pytest.mark.parametrize("make", MODELS)
def test_the_text_decoder_of_an_image_text_model_is_not_its_encoder(make):
    model, _ = made(make)
    decoder = text_decoder(model)
    assert decoder.config is model.config.get_text_config(decoder=True)
    assert decoder.get_input_embeddings() is model.get_input_embeddings()


def test_a_head_that_is_called_decoder_is_none():
    model, ids = modernbert(), tokens(40)
    assert isinstance(model.get_decoder(), nn.Linear)
    assert text_decoder(model) is model.model
    n = len(model.config.layer_types)
    full = model.config.layer_types.count("full_attention")
    cache = pressed(model, cp.KnormPress(0.5), ids)
    assert [len(head) for layer in kept(cache) for head in layer[0]] == [20] * 4 * full
    assert len(cache.layers) == n == 4


def test_a_decoder_that_was_replaced_is_found_anew():
    model = tiny()
    assert text_decoder(model) is model.model
    model.model = tiny().model
    assert text_decoder(model) is model.model


def test_several_decoders_are_refused_by_name():
    with pytest.raises(cp.UnsupportedError, match="BltForCausalLM has several decoders"):
        cp.KnormPress(0.5)(blt())


def test_what_keeps_no_keys_and_values_is_refused_by_name():
    config = hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(cp.UnsupportedError, match="MambaForCausalLM"):
        cp.KnormPress(0.5)(hf.MambaForCausalLM(config))


def test_a_wrapped_model_is_pressed_like_its_own():
    model, ids = exact_tiny(), tokens(30)
    wanted = kept(pressed(model, cp.SnapKVPress(0.5, window_size=8), ids))
    wrapped = Wrapped(model)
    assert text_decoder(wrapped) is model.model
    assert kept(pressed(wrapped, cp.SnapKVPress(0.5, window_size=8), ids)) == wanted
