"""Finds the parts of a transformers model: its cache layers, attention and rotary modules."""

import copy
import inspect
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.configuration_utils import PretrainedConfig

from cachepress.cache.layer import CompressedLayer
from cachepress.errors import UnsupportedError
from cachepress.hf.rotary import CosSin

CACHE_NAMES = ("cache", "past_key_values")
_SPARE = 4


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedError unless the model's KV cache can be compressed."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"got {name}, wanted a transformers PreTrainedModel")
    if model.config.is_encoder_decoder:
        raise UnsupportedError(f"{name} is an encoder-decoder model: wanted a decoder-only model")
    if not any(full_attention(model.get_decoder().config)):
        raise UnsupportedError(
            f"{name} has no full-attention layer: its sliding-window or linear-attention layers "
            "already bound their cache, there is nothing to compress"
        )


def cache_argument(module: nn.Module) -> str:
    """Return the name of a forward's cache argument, which transformers versions differ in."""
    parameters = inspect.signature(module.forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise UnsupportedError(f"{type(module).__name__}.forward takes no cache")


def install_layers(cache: Cache, model: PreTrainedModel) -> dict[int, CompressedLayer]:
    """Replace a cache's full-attention layers by compressed layers that hold the same pairs.

    Returns:
        The compressed layers by layer index.

    Raises:
        UnsupportedError: if the cache is of a kind that cannot be compressed.
    """
    name, config = type(model).__name__, model.get_decoder().config
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        raise UnsupportedError(
            f"got {kind} for {name}: pass a DynamicCache(), or no cache, and no "
            "cache_implementation, which makes others"
        )
    template = DynamicCache(config=config).layers
    cache.layers.extend(template[len(cache.layers) :])
    installed = {}
    for index, full in enumerate(full_attention(config)):
        layer = cache.layers[index]
        if not full:
            continue
        if not isinstance(layer, CompressedLayer):
            layer = CompressedLayer.adopt(
                getattr(layer, "keys", None), getattr(layer, "values", None)
            )
            cache.layers[index] = layer
        installed[index] = layer
    return installed


def sample_cache(model: PreTrainedModel, n: int, ours: bool) -> Cache:
    """Let a model fill a cache of ``n`` sequences of ``n`` tokens each.

    The forward is called without the decoder's module hooks, so that no press observes it.

    Args:
        model: the model; our attention function has to be selected on it.
        n: number of sequences, and of tokens of each.
        ours: whether full-attention layers are compressed layers, which hold keys and values in
            the type that they come in; some of transformers' own change the type of values.
    """
    decoder = model.get_decoder()
    cache = DynamicCache(config=decoder.config)
    if ours:
        install_layers(cache, model)
    ids = torch.zeros(n, n, dtype=torch.long, device=model.device)
    with torch.no_grad():
        decoder.forward(input_ids=ids, **{cache_argument(decoder): cache, "use_cache": True})
    return cache


def learned_positions(model: PreTrainedModel) -> int | None:
    """Return the most tokens of a text where the model learned an embedding for each position.

    None for a model with rotary or other computed positions.
    """
    decoder = model.get_decoder()
    most = getattr(decoder.config, "max_position_embeddings", None)
    words = {id(decoder.get_input_embeddings()), id(model.get_input_embeddings())}
    tables = [m for m in decoder.modules() if isinstance(m, nn.Embedding) and id(m) not in words]
    # Some models reserve a few entries of the table for padding.
    learned = any(most <= m.num_embeddings <= most + _SPARE for m in tables) if most else False
    return most if learned else None


def n_compressed_layers(model: PreTrainedModel) -> int:
    """Count the layers of a model that are compressed: those with full attention."""
    return sum(full_attention(model.get_decoder().config))


def has_only_full_attention(model: PreTrainedModel) -> bool:
    """Tell whether every layer of the model has full attention, and so an unbounded cache."""
    return all(full_attention(model.get_decoder().config))


def full_attention(config: PretrainedConfig) -> list[bool]:
    """Tell which layers have full attention, and so an ordinary, unbounded cache."""
    return [type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers]


def attention_modules(decoder: PreTrainedModel) -> list[nn.Module]:
    """Find the attention modules of full-attention layers, and others with such a layer index."""
    full = {index for index, is_full in enumerate(full_attention(decoder.config)) if is_full}
    return [m for m in decoder.modules() if getattr(m, "layer_idx", None) in full]


def last_layer(decoder: PreTrainedModel) -> nn.Module:
    """Find the last of the decoder's layers, whose output is the hidden states before the norm."""
    n = len(full_attention(decoder.config))
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if not lists:
        raise UnsupportedError(
            f"the layers of {type(decoder).__name__} were not found: presses that need gradients "
            "cannot be used with it"
        )
    return lists[0][-1]


def rotary_modules(decoder: PreTrainedModel) -> list[CosSin]:
    """Copy the modules that compute cosines and sines of positions.

    They are copied because some (dynamic NTK) change their state at a long position.
    """
    found: list[CosSin] = []
    for module in decoder.modules():
        parameters = list(inspect.signature(module.forward).parameters)
        if parameters[:2] != ["x", "position_ids"]:
            continue
        module = copy.deepcopy(module)
        if "layer_type" in parameters:
            found.append(partial(_call_rotary, module, "full_attention"))
        else:
            found.append(partial(_call_rotary, module, None))
    return found


def _call_rotary(
    module: nn.Module, layer_type: str | None, x: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    return module(x, positions) if layer_type is None else module(x, positions, layer_type)
