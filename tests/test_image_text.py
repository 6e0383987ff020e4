"""The text decoder of an image-text model is pressed like any other, image tokens included."""

from collections.abc import Mapping

import pytest
import torch
import transformers as hf
from torch import Tensor

import cachepress as cp
from tests.bounds import near

IMAGE = 99
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EYE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
Inputs = Mapping[str, Tensor]


def words(patches: int) -> Tensor:
    ids = torch.randint(3, 90, (1, 32))
    return torch.cat([ids[:, :4], torch.full((1, patches), IMAGE), ids[:, 4:]], 1)


def llava() -> tuple[hf.PreTrainedModel, Inputs]:
    parts = {"vision_config": hf.CLIPVisionConfig(**EYE), "text_config": hf.LlamaConfig(**TEXT)}
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(image_token_index=IMAGE, **parts))
    return model, {"input_ids": words(16), "pixel_values": torch.randn(1, 3, 32, 32)}


def smolvlm() -> tuple[hf.PreTrainedModel, Inputs]:
    options = {"text_config": hf.LlamaConfig(**TEXT), "vision_config": EYE, "scale_factor": 2}
    model = hf.SmolVLMForConditionalGeneration(hf.SmolVLMConfig(image_token_id=IMAGE, **options))
    return model, {"input_ids": words(4), "pixel_values": torch.randn(1, 1, 3, 32, 32)}


def gemma3() -> tuple[hf.PreTrainedModel, Inputs]:
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    parts = {"text_config": {**TEXT, **kinds}, "vision_config": EYE, "mm_tokens_per_image": 4}
    marks = {"image_token_index": IMAGE, "boi_token_index": 98, "eoi_token_index": 97}
    config = hf.Gemma3Config(**parts, **marks)
    ids = words(4)
    inputs = {"input_ids": ids, "token_type_ids": (ids == IMAGE).long()}
    model = hf.Gemma3ForConditionalGeneration(config)
    return model, {**inputs, "pixel_values": torch.randn(1, 3, 32, 32)}


def qwen2_5_vl() -> tuple[hf.PreTrainedModel, Inputs]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    eye = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8}
    eye |= {"out_hidden_size": 32, "fullatt_block_indexes": [0], "window_size": 32}
    config = hf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_scaling": rope},
        vision_config=eye,
        image_token_id=IMAGE,
        vision_start_token_id=98,
        vision_end_token_id=97,
    )
    ids = words(4)
    ids[:, 3], ids[:, 8] = 98, 97
    inputs = {"input_ids": ids, "pixel_values": torch.randn(16, 3 * 2 * 8 * 8)}
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    model = hf.Qwen2_5_VLForConditionalGeneration(config)
    return model, {**inputs, "mm_token_type_ids": (ids == IMAGE).int()}


def made(make) -> tuple[hf.PreTrainedModel, Inputs]:
    torch.manual_seed(0)
    model, inputs = make()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model.double().eval(), inputs


@torch.no_grad()
def read(model, inputs: Inputs, press: cp.BasePress | None) -> tuple[Tensor, hf.DynamicCache]:
    cache = hf.DynamicCache(config=model.config)
    if press is None:
        return model(**inputs, past_key_values=cache).logits, cache
    with press(model):
        return model(**inputs, past_key_values=cache).logits, cache


def continued(model, ids: Tensor, cache: hf.DynamicCache) -> Tensor:
    """Logits of three steps of ``generate`` after one more token."""
    whole = torch.cat([ids, torch.tensor([[7]])], 1)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(whole, past_key_values=cache, output_logits=True, **options)
    return torch.stack(found.logits)


MODELS = [llava, smolvlm, gemma3, qwen2_5_vl]


@pytest.mark.parametrize("make", MODELS)
def test_nothing_evicted_is_no_press(make):
    model, inputs = made(make)
    wanted, whole = read(model, inputs, None)
    ours, cache = read(model, inputs, cp.KeyDiffPress(0.0))
    assert torch.equal(ours, wanted)
    after = (continued(model, inputs["input_ids"], kept) for kept in (cache, whole))
    near(*after, torch.float32, 1)  # generate() gives float32, whatever the model computes in


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("press", [cp.KeyDiffPress(0.5), cp.SnapKVPress(0.5, window_size=8)])
def test_half_of_words_and_image_stay_and_the_encoder_sees_as_before(make, press):
    model, inputs = made(make)
    seen = inputs["input_ids"].shape[1]
    wanted, _ = read(model, inputs, None)
    ours, cache = read(model, inputs, press)
    assert torch.equal(ours, wanted)
    full = [layer for layer in cache.layers if not getattr(layer, "is_sliding", False)]
    assert {int(n) for layer in full for n in layer.lengths.flatten()} == {seen // 2}
    assert len(full) == (1 if make is gemma3 else 2)
    assert continued(model, inputs["input_ids"], cache).isfinite().all()


def test_positions_in_sections_are_refused_where_they_would_have_to_be_undone():
    model, inputs = made(qwen2_5_vl)
    with pytest.raises(cp.UnsupportedError, match="position embedding of layer 0 of Qwen2_5_VL"):
        read(model, inputs, cp.ExpectedAttentionPress(0.5))
