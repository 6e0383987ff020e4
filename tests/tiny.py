"""Tiny random models of many architectures: small enough for every test, on CPU, offline."""

from functools import cache, partial

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.exact import doubled
from tests.scratch import scratch
from tests.shaken import shaken

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HALF_SLIDING = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

ARCHITECTURES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "qwen3_next": (
        "Qwen3Next",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "gemma2": (
        "Gemma2",
        {"layer_types": HALF_SLIDING, "sliding_window": 16, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (
        "Gemma3",
        {"layer_types": HALF_SLIDING, "sliding_window": 16, "query_pre_attn_scalar": 8},
    ),
    "gpt_oss": (
        "GptOss",
        {
            "layer_types": HALF_SLIDING,
            "sliding_window": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "glm4": ("Glm4", {"partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2", {"n_head": 4}),
}
FULL_ONLY = [name for name, (_, extra) in ARCHITECTURES.items() if "layer_types" not in extra]
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}


@cache
def _config_and_weights(name: str) -> PreTrainedModel:
    family, extra = ARCHITECTURES[name]
    values = {**SMALL, **extra}
    if family == "GPT2":
        values = {GPT2_NAMES.get(k, k): v for k, v in values.items()}
        values = {k: v for k, v in values.items() if k not in ("head_dim", "num_key_value_heads")}
    config_class = _class(family, "Config", "TextConfig")
    model_class = _class(family, "ForCausalLM", "LMHeadModel")
    torch.manual_seed(0)
    model = model_class(config_class(**values))
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.2 * torch.randn_like(weight)
    return model.eval()


def _class(family: str, *endings: str) -> type:
    for ending in reversed(endings):
        found = getattr(transformers, family + ending, None)
        if found is not None:
            return found
    raise LookupError(f"{family} with {endings}")


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh copy of the tiny model of an architecture; the same weights every time.

    In float64 it computes in float64 throughout, where transformers' own models do not.
    """
    source = _config_and_weights(name)
    if dtype == torch.float64:
        model = doubled(source)
    else:
        model = type(source)(type(source.config).from_dict(source.config.to_dict()))
        model.load_state_dict(source.state_dict())
        model.to(dtype)
    model.config.name_or_path = _tokenizer_folder()
    return shaken(model.eval())


@cache
def _tokenizer_folder() -> str:
    """A folder with a tokenizer, as there is where a model comes from."""
    folder = str(scratch())
    tokenizer().save_pretrained(folder)
    return folder


def exact_tiny(name: str = "llama") -> PreTrainedModel:
    """The tiny model of an architecture in float64: what is about algebra is checked with it."""
    return tiny(name, torch.float64)


def tokens(n: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, n]`` without special ones; none comes twice in a text up to 93.

    A token that comes twice has keys of the same length, which differ in the last bits: whether
    the one or the other is kept would hang on rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = range(-(-n // 93))
    texts = [[torch.randperm(93, generator=generator) for _ in rounds] for _ in range(batch)]
    return 3 + torch.stack([torch.cat(parts)[:n] for parts in texts])


randn = partial(torch.randn, dtype=torch.float64)
"""Normal numbers in float64."""
rand = partial(torch.rand, dtype=torch.float64)
"""Numbers from 0 to 1 in float64."""


SPECIAL = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "abcdef": 96}


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of words, w3 to w95; any other word is padding.

    transformers looks for stop strings by way of the word "abcdef", so there is one.
    """
    vocabulary = {**SPECIAL, **{f"w{i}": i for i in range(3, 96)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    if chat:
        made.chat_template = (
            "w3 w4 {{ messages[0]['content'] }} w5{% if enable_thinking %} w8{% endif %} w6 "
        )
    return made


def words(n: int, seed: int = 0) -> str:
    """A text of ``n`` words."""
    return " ".join(f"w{i}" for i in tokens(n, seed=seed)[0].tolist())
