"""Tiny image-text models of random weights, and inputs with a picture for each."""

from collections.abc import Callable, Mapping

import torch
import transformers as hf
from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from tests.tiny import SMALL

IMAGE = 99
TEXT = {**SMALL, "vocab_size": 100, "num_hidden_layers": 2}
EYE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
Inputs = Mapping[str, Tensor]
Made = tuple[hf.PreTrainedModel, Inputs]


def words(patches: int) -> Tensor:
    ids = torch.randint(3, 90, (1, 32))
    return torch.cat([ids[:, :4], torch.full((1, patches), IMAGE), ids[:, 4:]], 1)


def picture(*shape: int) -> Tensor:
    return torch.randn(*shape, 3, 32, 32)


def llava() -> Made:
    parts = {"vision_config": hf.CLIPVisionConfig(**EYE), "text_config": hf.LlamaConfig(**TEXT)}
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(image_token_index=IMAGE, **parts))
    return model, {"input_ids": words(16), "pixel_values": picture(1)}


def llava_onevision() -> Made:
    parts = {"vision_config": hf.SiglipVisionConfig(**EYE), "text_config": hf.Qwen2Config(**TEXT)}
    pins = {"image_grid_pinpoints": [[32, 32]], "video_token_index": 98}
    config = hf.LlavaOnevisionConfig(image_token_index=IMAGE, **parts, **pins)
    model = hf.LlavaOnevisionForConditionalGeneration(config)
    # A picture twice, small and as it is, the second with a token at the end of each row.
    inputs = {"input_ids": words(16 + 16 + 4), "pixel_values": picture(1, 2)}
    return model, {**inputs, "image_sizes": torch.tensor([[32, 32]])}


def smolvlm() -> Made:
    options = {"text_config": hf.LlamaConfig(**TEXT), "vision_config": EYE, "scale_factor": 2}
    model = hf.SmolVLMForConditionalGeneration(hf.SmolVLMConfig(image_token_id=IMAGE, **options))
    return model, {"input_ids": words(4), "pixel_values": picture(1, 1)}


def idefics3() -> Made:
    options = {"text_config": hf.LlamaConfig(**TEXT), "vision_config": EYE, "scale_factor": 2}
    config = hf.Idefics3Config(image_token_id=IMAGE, **options)
    model = hf.Idefics3ForConditionalGeneration(config)
    return model, {"input_ids": words(4), "pixel_values": picture(1, 1)}


def mistral3() -> Made:
    eye = hf.PixtralVisionConfig(**EYE, head_dim=8)
    text = hf.MistralConfig(**TEXT, sliding_window=None)
    options = {"vision_config": eye, "text_config": text, "spatial_merge_size": 2}
    config = hf.Mistral3Config(image_token_index=IMAGE, **options)
    inputs = {"input_ids": words(4), "pixel_values": picture(1)}
    model = hf.Mistral3ForConditionalGeneration(config)
    return model, {**inputs, "image_sizes": torch.tensor([[32, 32]])}


def internvl() -> Made:
    eye = {**EYE, "image_size": [32, 32], "patch_size": [8, 8]}
    config = hf.InternVLConfig(
        vision_config=eye, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE
    )
    model = hf.InternVLForConditionalGeneration(config)
    return model, {"input_ids": words(4), "pixel_values": picture(1)}


def gemma3() -> Made:
    parts = {"text_config": {**TEXT, **SLIDING}, "vision_config": EYE, "mm_tokens_per_image": 4}
    marks = {"image_token_index": IMAGE, "boi_token_index": 98, "eoi_token_index": 97}
    ids = words(4)
    inputs = {"input_ids": ids, "token_type_ids": (ids == IMAGE).long()}
    model = hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(**parts, **marks))
    return model, {**inputs, "pixel_values": picture(1)}


def paligemma() -> Made:
    text = hf.GemmaConfig(**TEXT)
    eye = hf.SiglipVisionConfig(**EYE, projection_dim=32, vision_use_head=False)
    options = {"image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32}
    config = hf.PaliGemmaConfig(text_config=text, vision_config=eye, **options)
    ids = words(16)
    model = hf.PaliGemmaForConditionalGeneration(config)
    return model, {"input_ids": ids, "pixel_values": picture(1)}


def llama4() -> Made:
    experts = {"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1}
    kinds = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 16}
    text = hf.Llama4TextConfig(**TEXT, **experts, **kinds)
    out = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    eye = hf.Llama4VisionConfig(**{**EYE, "intermediate_size": 128}, **out)
    config = hf.Llama4Config(text_config=text, vision_config=eye, image_token_index=IMAGE)
    model = hf.Llama4ForConditionalGeneration(config)
    if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        # transformers 5.24 asks its text decoder for this, and Llama 4 runs on nothing.
        MoeCausalLMOutputWithPast.image_outputs = None
    return model, {"input_ids": words(4), "pixel_values": picture(1)}


def _qwen(kind: str, sections: list[int], **eye: object) -> Made:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    marks = {"vision_start_token_id": 98, "vision_end_token_id": 97, "video_token_id": 96}
    config = getattr(hf, f"{kind}Config")(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={"depth": 2, "num_heads": 4, "patch_size": 8, **eye},
        image_token_id=IMAGE,
        **marks,
    )
    ids = words(4)
    ids[:, 3], ids[:, 8] = 98, 97
    inputs = {"input_ids": ids, "pixel_values": torch.randn(16, 3 * 2 * 8 * 8)}
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config)
    return model, {**inputs, "mm_token_type_ids": (ids == IMAGE).int()}


def qwen2_vl() -> Made:
    return _qwen("Qwen2VL", [1, 1, 2], embed_dim=32, hidden_size=32, mlp_ratio=2)


def qwen2_5_vl() -> Made:
    eye = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 32}
    return _qwen("Qwen2_5_VL", [1, 1, 2], fullatt_block_indexes=[0], **eye)


def qwen3_vl() -> Made:
    eye = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    more = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return _qwen("Qwen3VL", [2, 1, 1], **eye, **more)


MODELS: list[Callable[[], Made]] = [
    llava,
    llava_onevision,
    smolvlm,
    idefics3,
    mistral3,
    internvl,
    gemma3,
    paligemma,
    llama4,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
]
SECTIONS = (qwen2_vl, qwen2_5_vl, qwen3_vl)
"""Those whose picture tokens have three positions each."""


def made(make: Callable[[], Made]) -> Made:
    """A model in float64, and its inputs."""
    torch.manual_seed(0)
    model, inputs = make()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model.double().eval(), inputs
