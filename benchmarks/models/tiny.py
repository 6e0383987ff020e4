"""Builds a tiny random model of any causal model type of transformers.

The numbers of a type's default config are replaced by small ones, by name; what that cannot know
stands in a table of exceptions.
"""

import inspect

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig, DbrxFFNConfig

VOCABULARY, LAYERS, HEADS, WIDTH = 120, 4, 4, 32

NUMBERS: list[tuple[float, tuple[str, ...]]] = [
    (VOCABULARY, ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input")),
    (
        LAYERS,
        (
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
            *("encoder_layers", "num_encoder_layers", "num_decoder_layers", "num_blocks"),
        ),
    ),
    (
        HEADS,
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
            *("encoder_attention_heads", "num_encoder_attention_heads", "attention_heads"),
            *("num_decoder_attention_heads", "swa_num_attention_heads", "linear_num_value_heads"),
            *("linear_num_heads", "index_n_heads"),
        ),
    ),
    (
        2,
        (
            *(
                "num_key_value_heads",
                "num_kv_heads",
                "swa_num_key_value_heads",
                "linear_num_key_heads",
            ),
            *("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", "top_k"),
            *("first_k_dense_replace", "mamba_n_groups", "n_groups"),
        ),
    ),
    (
        WIDTH,
        (
            *(
                "hidden_size",
                "d_model",
                "n_embd",
                "embedding_size",
                "word_embed_proj_dim",
                "emb_dim",
            ),
            *("input_embedding_size", "output_embedding_size", "lru_width", "embedding_dim"),
            *("attention_hidden_size", "backbone_hidden_size", "mamba_d_ssm"),
        ),
    ),
    (
        48,
        (
            *(
                "intermediate_size",
                "ffn_dim",
                "decoder_ffn_dim",
                "encoder_ffn_dim",
                "ffn_hidden_size",
            ),
            *("dim_ff", "dff", "d_inner", "intermediate_size_mlp", "dense_intermediate_size"),
            *("feed_forward_size", "prefix_dense_intermediate_size"),
        ),
    ),
    (
        8,
        (
            *(
                "head_dim",
                "swa_head_dim",
                "linear_key_head_dim",
                "linear_value_head_dim",
                "dim_head",
            ),
            *("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "kv_channels"),
            *(
                "d_head",
                "index_head_dim",
                "linear_head_dim",
                "attention_head_size",
                "global_head_dim",
            ),
            *("mamba_d_head", "mamba_head_dim", "mamba_n_heads", "mamba_num_heads", "d_rel"),
            *("hidden_size_per_layer_input", "laurel_rank", "query_pre_attn_scalar"),
        ),
    ),
    (
        16,
        (
            *("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
            *("shared_intermediate_size", "moe_shared_expert_intermediate_size", "q_lora_rank"),
            *("shared_experts_intermediate_size", "kv_lora_rank", "sliding_window", "window_size"),
            *("sliding_window_size", "attention_chunk_size", "local_attention", "mamba_chunk_size"),
            *(
                "attention_window_size",
                "state_size",
                "mamba_d_state",
                "ssm_state_size",
                "chunk_size",
            ),
            *("time_step_rank", "mamba_dt_rank", "qk_head_dim", "block_size", "loop_gate_rank"),
        ),
    ),
    (4, ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")),
    (
        1,
        (
            *(
                "n_group",
                "topk_group",
                "num_expert_group",
                "n_shared_experts",
                "num_shared_experts",
            ),
            *("moe_num_shared_experts", "num_dense_layers", "num_nextn_predict_layers"),
        ),
    ),
    (
        512,
        (
            *("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "model_max_length"),
            *("max_target_positions", "context_length", "rel_extent", "index_topk"),
        ),
    ),
    (0.3, ("initializer_range", "init_std")),
]
SMALL = {name: number for number, names in NUMBERS for name in names}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
IDS |= {"decoder_start_token_id": 1, "cls_token_id": 1}

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
HALF_SLIDING, HALF_LINEAR = [SLIDING, FULL] * 2, [LINEAR, FULL] * 2
Options = dict[str, object]
LISTS = {"layer_types", "mlp_layer_types", "layers_block_type", "indexer_types"}
"""Options that say the kind of each layer."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {"indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": 8}
INDEXER |= {"indexer_budget": 64, "indexer_compress_ratio": 4}
NO_LAYER_INPUT: Options = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
NO_LAYER_INPUT |= {"hidden_size": WIDTH, "head_dim": 8}
NO_LAYER_INPUT |= {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "intermediate_size": 48}
BYTES: Options = {"vocab_size": 260, "num_hidden_layers": 1, "num_key_value_heads": HEADS}
LOCAL: Options = {**BYTES, "cross_attn_k": 1, "hidden_size_global": WIDTH}
NO_WINDOW: Options = {"sliding_window": None}
"""Full attention, where a type may have a window in all of its layers or in none."""
EXCEPTIONS: dict[str, Options] = {
    "doge": NO_WINDOW,
    "ministral": {"layer_types": HALF_SLIDING},
    "ministral3": NO_WINDOW,
    "mistral": NO_WINDOW,
    "mixtral": NO_WINDOW,
    "phi3": NO_WINDOW,
    "phi4_multimodal": NO_WINDOW,
    "phimoe": NO_WINDOW,
    "starcoder2": NO_WINDOW,
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        **{"vocab_size": 260, "encoder_hash_byte_group_vocab": 50, "patch_in_forward": False},
        **{"patcher_config": BYTES, "global_config": BYTES},
        **{"encoder_config": LOCAL, "decoder_config": LOCAL},
    },
    "cohere_compass_text": {"rope_parameters": {FULL: ROPE, SLIDING: ROPE}},
    "dbrx": {
        "attn_config": DbrxAttentionConfig(kv_n_heads=2, clip_qkv=8, rope_theta=1e4),
        "ffn_config": DbrxFFNConfig(hidden_size=WIDTH, ffn_hidden_size=48, moe_num_experts=4),
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "falcon_h1": {"mamba_d_head": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": None},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **NO_LAYER_INPUT}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HALF_LINEAR},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", FULL] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp": INDEXER,
    "qwen4_exp_text": INDEXER,
    "reformer": {
        **{"attention_head_size": 8, "axial_pos_shape": [16, 32], "num_buckets": 4},
        "axial_pos_embds_dim": [8, 24],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""Options of a type that its names do not give."""


def types() -> list[str]:
    """List the causal model types of transformers."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(kind: str, seed: int = 0) -> PreTrainedModel:
    """Build a tiny random model of a type, ready to compute."""
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    config_class = model_class.config_class or CONFIG_MAPPING[kind]
    torch.manual_seed(seed)
    model = model_class(config_of(config_class, EXCEPTIONS.get(kind, {}))).eval()
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.2 * torch.randn_like(weight)
    return model


def config_of(kind: type[PreTrainedConfig], options: Options) -> PreTrainedConfig:
    """Make a small config of a class, with options of its own."""
    usual = _usual(kind)
    known = set(inspect.signature(kind.__init__).parameters) | set(vars(usual or kind))
    chosen: Options = {name: x for name, x in {**SMALL, **IDS}.items() if name in known}
    if "is_decoder" in known:
        chosen["is_decoder"] = True
    if "kv_lora_rank" in known:
        chosen["num_key_value_heads"] = HEADS
    for name in LISTS & known:
        chosen[name] = _one_of_each(getattr(usual, name, None))
    for name in kind.sub_configs:
        own, part = options.get(name, {}), getattr(usual, name, kind.sub_configs[name])
        part = type(part) if isinstance(part, PreTrainedConfig) else part
        if isinstance(own, dict) and isinstance(part, type) and hasattr(part, "model_type"):
            chosen[name] = config_of(part, own)
    parts = {name for name in options if name in chosen and name in kind.sub_configs}
    chosen = {name: x for name, x in chosen.items() if x is not None}
    return kind(**chosen | {name: x for name, x in options.items() if name not in parts})


def _usual(kind: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    """Make the usual config of a class; None where a class refuses its own."""
    try:
        return kind()
    except Exception:  # What a class raises of itself is of many kinds.
        return None


def _one_of_each(kinds: object) -> list[str] | None:
    """Make a list for few layers in which every kind of layer comes."""
    if not isinstance(kinds, list) or not kinds or not isinstance(kinds[0], str):
        return None
    kinds = list(dict.fromkeys(kinds))
    return [kinds[i % len(kinds)] for i in range(LAYERS)]
