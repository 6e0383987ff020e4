"""Makes models with random weights in the shapes of known ones, to measure seconds and bytes.

Their answers mean nothing.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cachepress.errors import CachepressError

SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "llama-3.1-8b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
    ),
    "qwen3-4b": (
        "qwen3",
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
        },
    ),
    "smollm2-135m": (
        "llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
        },
    ),
}
"""Shapes of known models, for ``--config``."""


def random_model(
    name: str, layers: int | None, dtype: str | None, device: str | None
) -> PreTrainedModel:
    """Make a model with random weights.

    Args:
        name: one of ``SHAPES``, or a folder with a config.json.
        layers: number of layers; None for all of the shape.
        dtype: type of the weights; None for float32 on a CPU, bfloat16 elsewhere.
        device: device of the weights; None for a GPU if there is one.

    Raises:
        CachepressError: if there is no such shape.
    """
    config = _config(name)
    if layers is not None:
        config.num_hidden_layers = layers
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=kind).eval()


def _config(name: str) -> PretrainedConfig:
    if name in SHAPES:
        kind, sizes = SHAPES[name]
        return AutoConfig.for_model(kind, **sizes)
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CachepressError(
            f"config: got {name!r}, wanted one of {', '.join(SHAPES)}, or a folder with a "
            "config.json"
        ) from error
