"""Finds the parts of a transformers model: its cache layers and attention modules."""

import inspect
from collections.abc import Mapping
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from transformers.configuration_utils import PretrainedConfig

from cachepress.cache.hybrid import CompressedHybridLayer
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.offloading import link, offloaded
from cachepress.errors import UnsupportedError
from cachepress.hf.attention import Selection, deselect, select
from cachepress.hf.blocks import unobserved
from cachepress.hf.hooks import unhooked
from cachepress.hf.steps import stand_around
from cachepress.limits import described
from cachepress.ops import wait

_Module = TypeVar("_Module", bound=nn.Module)
CACHE_NAMES = ("cache", "past_key_values")
_FULL = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
_SPARE = 4
_DECODERS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""The path to the text decoder of each model."""


def text_decoder(model: nn.Module) -> PreTrainedModel:
    """Find the text decoder of a model: the module whose forward fills the KV cache.

    It is the innermost model of transformers whose forward takes a cache. transformers'
    ``get_decoder()`` guesses by the name of an attribute; here it only tells several of them apart,
    as where a model speaks, too.

    Args:
        model: a causal or image-text model, or what wraps one, such as a ``PeftModel``.

    Raises:
        UnsupportedError: if there is no such module, or more than one.
    """
    if not isinstance(model, nn.Module):
        has_one = isinstance(getattr(model, "model", None), PreTrainedModel)  # A pipeline has.
        inside = ", such as its .model" if has_one else ""
        wanted = f"wanted a transformers PreTrainedModel{inside}"
        raise UnsupportedError(f"model: got {described(model)}, {wanted}")
    path = _DECODERS.get(model)
    if path is None:
        path = _DECODERS[model] = _path_to_decoder(model)
    return cast(PreTrainedModel, model.get_submodule(path))


def _path_to_decoder(model: nn.Module) -> str:
    name, paths = type(model).__name__, {m: path for path, m in model.named_modules()}
    found = _innermost(model)
    if len(found) > 1 and hasattr(model, "get_decoder"):
        guess = cast(PreTrainedModel, model).get_decoder()
        found = _innermost(guess) if guess in paths else found
    if not found:
        raise UnsupportedError(f"{name} keeps no cache of keys and values: nothing to compress")
    if len(found) > 1:
        kinds = ", ".join(sorted(type(m).__name__ for m in found))
        raise UnsupportedError(
            f"{name} has several decoders ({kinds}), each with a cache of its own: wanted a model "
            "with one text decoder"
        )
    return paths[found[0]]


def _innermost(module: nn.Module) -> list[PreTrainedModel]:
    """List the models of transformers in a module that take a cache, and hold no other such."""
    taking = [m for m in module.modules() if isinstance(m, PreTrainedModel) and _takes_cache(m)]
    return [m for m in taking if not any(x in taking for x in m.modules() if x is not m)]


def _takes_cache(module: nn.Module) -> bool:
    return any(name in inspect.signature(module.forward).parameters for name in CACHE_NAMES)


def check_model(model: nn.Module) -> None:
    """Raise UnsupportedError unless the model's KV cache can be compressed."""
    inner = unwrapped(model)
    name = type(inner).__name__
    if not isinstance(inner, PreTrainedModel):
        inside = ", such as the one inside, ._orig_mod" if hasattr(inner, "_orig_mod") else ""
        raise UnsupportedError(f"got {name}, wanted a transformers PreTrainedModel{inside}")
    if _has_no_weights(inner):
        raise UnsupportedError(
            f"{name} is on the meta device and has no weights: load it with from_pretrained, "
            'outside of `with torch.device("meta")`'
        )
    if inner.config.is_encoder_decoder:
        raise UnsupportedError(f"{name} is an encoder-decoder model: wanted a decoder-only model")
    decoder = text_decoder(inner)
    if not decoder._can_set_attn_implementation():
        raise UnsupportedError(
            f"{name} does not use transformers' attention interface: its attention cannot be "
            "observed, so its cache cannot be compressed"
        )
    if not any(full_attention(decoder.config)):
        raise UnsupportedError(f"{name} has no full-attention layer: {_why_not(decoder.config)}")


def _has_no_weights(model: nn.Module) -> bool:
    """Tell whether all weights are on the meta device, and no hook brings them from elsewhere."""
    empty = all(x.is_meta and type(x.data) is Tensor for x in model.parameters())
    return empty and not any("_hf_hook" in vars(m) for m in model.modules())


def _why_not(config: PretrainedConfig) -> str:
    """Say why no layer of a model is compressed."""
    layers = DynamicCache(config=config).layers
    kinds = {type(layer).__name__ for layer in layers if not _is_bounded(layer)}
    if kinds:
        return f"it keeps the text in layers of a kind that is not compressed ({', '.join(kinds)})"
    if all(type(layer).__name__ == "DummyLayer" for layer in layers):
        return "it reads keys and values that another model keeps"
    return (
        "its sliding-window or linear-attention layers already bound their cache, there is nothing "
        "to compress"
    )


def _is_bounded(layer: object) -> bool:
    """Tell whether a cache layer does not grow with the text."""
    keeps = isinstance(layer, CacheLayerMixin)
    return not keeps or bool(getattr(layer, "is_sliding", False))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model of transformers that another one adapts, such as a ``PeftModel``."""
    while not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = cast(nn.Module, model.get_base_model())  # pyright: ignore[reportCallIssue]
    return model


def attach(model: nn.Module) -> Selection:
    """Select our attention function on a model, for as long as the selection is referred to."""
    decoder = text_decoder(model)
    selection = select(decoder)
    stand_around(unwrapped(model), decoder, selection)
    return selection


def detach(model: nn.Module) -> None:
    """Give a model back its own attention function now, although compressed caches of it live.

    Such a cache cannot be used with it afterwards: that raises ``ForeignAttentionError``. When none
    lives, and no block is open, the model has its own function anyway.
    """
    deselect(text_decoder(model))


def cache_argument(module: nn.Module) -> str:
    """Return the name of a forward's cache argument, which transformers versions differ in."""
    parameters = inspect.signature(unwrapped(module).forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise UnsupportedError(f"{type(module).__name__}.forward takes no cache")


def install_layers(
    cache: Cache, model: PreTrainedModel, offload: bool = False
) -> dict[int, CompressedLayer]:
    """Replace a cache's full-attention layers by compressed layers that hold the same pairs.

    Args:
        cache: the cache.
        model: the model that fills it.
        offload: whether segments are kept in host memory, as they are for a cache that transformers
            would offload. A cache that is offloaded stays so.

    Returns:
        The compressed layers by layer index.

    Raises:
        UnsupportedError: if the cache is of a kind that cannot be compressed.
    """
    name, config = type(model).__name__, text_decoder(model).config
    if type(cache) is not DynamicCache:
        offloads = getattr(cache, "offloading", False)
        raise UnsupportedError(
            f"got {type(cache).__name__} for {name}: pass a DynamicCache(), or no cache, and no "
            "cache_implementation, which makes others"
            + ("; cachepress.prefill(..., offload=True) offloads a DynamicCache" * offloads)
        )
    offload = _taken_over(cache, model) or offload
    selection = attach(model)
    template = DynamicCache(config=config).layers
    cache.layers.extend(template[len(cache.layers) :])
    installed = {}
    for index, full in enumerate(full_attention(config)):
        layer = cache.layers[index]
        if not full:
            continue
        layer = layer if isinstance(layer, CompressedLayer) else compressed(layer)
        layer = cache.layers[index] = offloaded(layer) if offload else layer
        layer.selection = selection
        installed[index] = layer
    link(installed.values())
    return installed


def _taken_over(cache: DynamicCache, model: PreTrainedModel) -> bool:
    """Bring back what transformers offloaded of a cache, and let it do so no longer.

    Returns:
        Whether it was to be offloaded.
    """
    if not cache.offloading:
        return False
    for layer in cache.layers:
        if getattr(layer, "is_initialized", False) and not isinstance(layer, CompressedLayer):
            wait(getattr(layer, "device", None) or model.device)
            layer.prefetch()
    cache.offloading = False
    vars(cache).pop("prefetch_stream", None)  # It can be neither copied nor pickled.
    return True


def compressed(layer: object) -> CompressedLayer:
    """Make the compressed layer that goes on where one of transformers' own is."""
    if isinstance(layer, LinearAttentionLayer):
        return CompressedHybridLayer.adopt_layer(layer)
    return CompressedLayer.adopt(getattr(layer, "keys", None), getattr(layer, "values", None))


def sample_cache(model: PreTrainedModel, n: int, ours: bool) -> Cache:
    """Let a model fill a cache of ``n`` sequences of ``n`` tokens each.

    The forward is called without the decoder's module hooks, and no press observes it.

    Args:
        model: the model.
        n: number of sequences, and of tokens of each.
        ours: whether full-attention layers are compressed layers, which hold keys and values in
            the type that they come in; some of transformers' own change the type of values.
    """
    decoder = text_decoder(model)
    cache = DynamicCache(config=decoder.config)
    if ours:
        install_layers(cache, model)
    with torch.no_grad(), unobserved(decoder):
        run_alone(decoder, sample_tokens(decoder, n, n), cache)
    return cache


def run_alone(decoder: PreTrainedModel, tokens: Tensor, cache: Cache) -> Tensor:
    """Run a forward that no hook of the decoder hears of, and return its hidden states.

    Args:
        decoder: the text decoder.
        tokens: ids ``[B, n]``, or embeddings ``[B, n, M]``.
        cache: the cache that it continues.
    """
    name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
    given = {name: tokens, cache_argument(decoder): cache, "use_cache": True}
    output = _without_hooks(decoder, {}).forward(**given)
    parts = output.values() if isinstance(output, Mapping) else output
    return output if isinstance(output, Tensor) else next(x for x in parts if torch.is_tensor(x))


def _without_hooks(module: _Module, done: dict[nn.Module, nn.Module]) -> _Module:
    """Copy a module and its parts, with the same weights but without hooks."""
    if module not in done:
        done[module] = copied = unhooked(module)
        parts = module._modules.items()
        inner = {name: part and _without_hooks(part, done) for name, part in parts}
        vars(copied).update(_modules=inner, _buffers=dict(module._buffers))
    return cast(_Module, done[module])


def sample_tokens(decoder: PreTrainedModel, b: int, n: int) -> Tensor:
    """Choose ids ``[b, n]`` of ``n`` tokens of the vocabulary that no option of the model names.

    For a decoder with several vocabularies it is embeddings ``[b, n, M]``.
    """
    table = decoder.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        width, generator = decoder.config.hidden_size, torch.Generator("cpu")
        return torch.randn(b, n, width, generator=generator).to(decoder.device, decoder.dtype)
    size = table.num_embeddings
    named = {x for name, x in vars(decoder.config).items() if name.endswith(("_id", "_index"))}
    free = (i % size for i in range(size // 2, size // 2 + size) if i % size not in named)
    ids = [i for i, _ in zip(free, range(n), strict=False)]
    return torch.tensor([(ids * n)[:n]], device=decoder.device).expand(b, n)


def trained_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens of text the model was trained for; None if its config does not say."""
    return getattr(text_decoder(model).config, "max_position_embeddings", None)


def learned_positions(model: PreTrainedModel) -> int | None:
    """Return how many positions the model learned embeddings for: a text can be no longer.

    None for a model with rotary or other computed positions.
    """
    decoder, most = text_decoder(model), trained_length(model)
    words = {id(decoder.get_input_embeddings()), id(model.get_input_embeddings())}
    tables = [m for m in decoder.modules() if isinstance(m, nn.Embedding) and id(m) not in words]
    # Some models reserve a few entries of the table for padding.
    learned = any(most <= m.num_embeddings <= most + _SPARE for m in tables) if most else False
    return most if learned else None


def n_compressed_layers(model: PreTrainedModel) -> int:
    """Count the layers of a model that are compressed: those with full attention."""
    return sum(full_attention(text_decoder(model).config))


def has_only_full_attention(model: PreTrainedModel) -> bool:
    """Tell whether every layer of the model has full attention, and so an unbounded cache."""
    layers = DynamicCache(config=text_decoder(model).config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def full_attention(config: PretrainedConfig) -> list[bool]:
    """Tell which layers have full attention over the text, and so an ordinary, unbounded cache.

    Layers that attend to a picture keep its keys and values in a layer of the same kind, and fill
    it only with the picture: they are left alone.
    """
    others = getattr(config.get_text_config(decoder=True), "cross_attention_layers", None) or ()
    layers = DynamicCache(config=config).layers
    return [type(layer) in _FULL and i not in others for i, layer in enumerate(layers)]


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
