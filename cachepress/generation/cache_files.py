"""Saves caches to files and loads them: a document compressed once, reused in another process.

Nothing in a file is run as code, and a damaged file is refused. Whether a saved cache fits its
model is checked in ``cachepress.generation.cache_checks``.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from cachepress.artefacts.digests import checksum_of
from cachepress.artefacts.fingerprint import fingerprint, other_model
from cachepress.cache.batch import TEXT, compressed_layers, note_text, text_of
from cachepress.cache.codec import Codec, Quantized
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.offloading import link, offloaded
from cachepress.cache.segment import Segment
from cachepress.cache.tail import Tail
from cachepress.errors import CachepressError
from cachepress.files import replacing
from cachepress.generation.cache_checks import Fitting, check_pages
from cachepress.hf import (
    SHIFT,
    attach,
    check_shift,
    learned_positions,
    sample_cache,
    set_shift,
    shift_of,
    text_decoder,
    use_shift,
)
from cachepress.hf.wiring import compressed, full_attention
from cachepress.ops import storing
from cachepress.ops.paged_attention import Layout
from cachepress.query_stats import QueryStats

T = TypeVar("T")
logger = logging.getLogger(__name__)
_FORMAT = "cachepress-cache-2"
_EARLIER = "cachepress-cache-1"
"""The format of version 0.1.0, whose checksum does not cover the header."""
_SAMPLE = 64
_LAYER = "Store"
_PARTS = {"Block": Segment, "Codec": Codec, "Layout": Layout, "Quantized": Quantized}
_NAMES_ON_DISK = {
    "_segments": "_blocks",
    "_compressed_at": "_settled_at",
    "scored_at": "looked_at",
    "page_budget": "reads",
    "query_stats": "trace",
    "text_valid": "known",
    "token_state": "carried",
    "key_channels": "channels",
}
"""The names in a file of the fields that were renamed since version 0.1.0. A file keeps the names
of that version, classes included, so that its caches can still be read."""
_UNSAVED = (TEXT, "hook", "reads_whole", "masks", "selection", "rotated")
_UNSAVED += ("_task", "_plans", "_number", "_columns", "_prefetch")
_TODAY = {on_disk: today for today, on_disk in _NAMES_ON_DISK.items()}


def save_cache(cache: Cache, path: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Write a cache to a safetensors file.

    Layers that are not compressed (sliding windows, recurrent states) are saved too, and so are the
    token ids of the text, as far as they are known. If saving fails there is no file.

    Args:
        cache: a cache that was filled by the model.
        path: where to write.
        model: the model; its fingerprint is saved, and checked when the cache is loaded.

    Raises:
        CachepressError: if the cache is empty or the file cannot be written.
    """
    if not cache.get_seq_length():
        raise CachepressError("the cache is empty: run a forward with it first")
    tensors: dict[str, Tensor] = {}
    layers = [
        [_kind(layer), _pack(_state(layer), str(i), tensors)]
        for i, layer in enumerate(cache.layers)
    ]
    if (text := text_of(cache)) is not None:
        tensors[TEXT] = text
    if (shift := shift_of(cache, model)) is not None:
        tensors[SHIFT] = shift
    tensors = {name: x.detach().contiguous().clone() for name, x in tensors.items()}
    header = json.dumps({"model": fingerprint(model), "layers": layers})
    checksum = checksum_of(tensors, header)
    target = Path(path)
    try:
        with replacing(target) as partial:
            save_file(tensors, partial, {"format": _FORMAT, "header": header, "checksum": checksum})
    except (OSError, ValueError, SafetensorError) as error:
        raise CachepressError(f"cannot write the cache to {target}: {error}") from error


@storing
def load_cache(
    path: str | os.PathLike[str], model: PreTrainedModel, *, offload: bool = False
) -> Cache:
    """Read a cache that ``save_cache`` wrote, for the model that filled it.

    Args:
        path: the file.
        model: the same model, with the same weights, config and dtype.
        offload: keep what was compressed in host memory, see ``cachepress.prefill``.

    Returns:
        The cache, on the model's device unless it is offloaded; the model is ready to read it.

    Raises:
        CachepressError: if the file is missing, damaged, no cache, or of another model.
    """
    metadata, tensors = _read(Path(path), torch.device("cpu") if offload else model.device)
    kind = metadata.get("format")
    if kind not in (_FORMAT, _EARLIER):
        raise CachepressError(f"{path} is not a cache that save_cache wrote")
    header = metadata.get("header", "") if kind == _FORMAT else ""
    if metadata.get("checksum") != checksum_of(tensors, header):
        raise CachepressError(f"{path} is damaged: its content does not match its checksum")
    try:
        if kind == _FORMAT:
            told = json.loads(header)
            layers, theirs = told["layers"], told["model"]["class"]
            other = other_model(told["model"], model)
        else:
            layers, theirs = json.loads(metadata["layers"]), metadata["model_class"]
            same = metadata["model"] == _fingerprint_of_0_1_0(model)
            other = None if same else "its fingerprint is another one"
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damage(path, error) from error
    if other is not None:
        raise CachepressError(
            f"{path} was filled by another model ({theirs}, or other config, weights or dtype) "
            f"than this {type(model).__name__}: {other}; load the model that it was made with"
        )
    cache = _filled(layers, tensors, model, path, offload)
    for layer in compressed_layers(cache):
        layer.selection = attach(model)
        layer.be_numbered()
    if kind == _EARLIER:
        logger.warning(
            "%s was saved by version 0.1.0, whose header nothing protects against damage: save it "
            "again",
            path,
        )
    return cache


def _filled(
    layers: list,
    tensors: Mapping[str, Tensor],
    model: PreTrainedModel,
    path: object,
    offload: bool,
) -> Cache:
    """Make a cache from packed layers; whatever does not fit together is damage."""
    config = text_decoder(model).config
    cache, full, fitting = DynamicCache(config=config), full_attention(config), _fitting(model)
    unused = dict(tensors)
    text, shift = unused.pop(TEXT, None), unused.pop(SHIFT, None)
    try:
        if len(layers) != len(cache.layers):
            raise ValueError(f"{len(layers)} layers, where the model has {len(cache.layers)}")
        for i, (kind, packed) in enumerate(layers):
            if kind == _LAYER and full[i]:
                cache.layers[i] = compressed(cache.layers[i])
            if _kind(cache.layers[i]) != kind:
                raise ValueError(f"layer {i} is a {kind}, where the model has none")
            device = _device_of(fitting.one.layers[i], model)
            state = cast(dict[str, object], _unpack(packed, unused, device))
            layer = _with_state(cast(CacheLayerMixin, cache.layers[i]), state, fitting, i, offload)
            cache.layers[i] = layer
        link(cache.layers)
        if unused:
            raise ValueError(f"nothing holds {next(iter(unused))}")
        fitting.check(cache)
        if text is not None:
            fitting.check_text(text, cache)
            note_text(cache, text, 0)
        if shift is not None:
            check_shift(shift)
            set_shift(cache, shift.to(model.device))
            use_shift(cache, model)
    except Exception as error:  # Whatever a damaged header leads to.
        raise _damage(path, error) from error
    return cache


def _with_state(
    layer: CacheLayerMixin, state: dict[str, object], fitting: Fitting, index: int, offload: bool
) -> CacheLayerMixin:
    """Give a layer the state of a saved one, and keep its segments on the host if asked to."""
    ours = isinstance(layer, CompressedLayer)
    # Layers of transformers get some fields when they are filled; versions differ in them.
    names = vars((fitting.compressed if ours else fitting.one).layers[index])
    if ours and state.pop("_groups", ()) != ():
        raise ValueError("it does not have one group of sequences")
    state = _named_today(state) if ours else state
    vars(layer).update({k: x for k, x in state.items() if k in names})
    if offload and isinstance(layer, CompressedLayer):
        layer = offloaded(layer)
        layer.restore()  # A layer that keeps everything puts it into a segment.
    return layer


def _device_of(layer: object, model: PreTrainedModel) -> torch.device:
    """Find the device that a model fills a layer on: it may be spread over several."""
    held = (x.device for x in vars(layer).values() if isinstance(x, Tensor))
    return next(held, model.device)


def _fitting(model: PreTrainedModel) -> Fitting:
    """Find what every cache of a model looks like, from sample caches that it fills."""
    return Fitting(
        compressed=sample_cache(model, 1, ours=True),
        one=sample_cache(model, 1, ours=False),
        two=sample_cache(model, 2, ours=False),
        vocabulary=_vocabulary(model),
        positions=learned_positions(model),
    )


def _vocabulary(model: PreTrainedModel) -> int:
    """Count the tokens that a model embeds, of its first vocabulary where it has several."""
    tables = model.get_input_embeddings().modules()
    return next(table.num_embeddings for table in tables if isinstance(table, nn.Embedding))


def _damage(path: object, error: Exception) -> CachepressError:
    return CachepressError(f"{path} is damaged: {type(error).__name__}, {error}")


def _kind(layer: object) -> str:
    return _LAYER if isinstance(layer, CompressedLayer) else type(layer).__name__


def _state(layer: object) -> dict[str, object]:
    """Return the fields of a layer that are saved.

    Query statistics are not: they belong to a prompt that is still being read, or to an answer.
    """
    # Not as ``vars`` has them: what is still on its way to the host is waited for.
    state = {name: getattr(layer, name) for name in vars(layer) if name not in _UNSAVED}
    if not isinstance(layer, CompressedLayer):
        return state
    return {
        _NAMES_ON_DISK.get(k, k): None if isinstance(x, QueryStats) else x for k, x in state.items()
    }


def _named_today(parts: Mapping[str, T]) -> dict[str, T]:
    """Rename the fields of a layer, or of what it holds, from names on disk to those of today."""
    return {_TODAY.get(name, name): x for name, x in parts.items()}


def _pack(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """Pack a value as JSON; its tensors go to ``tensors``, under names that begin with ``name``."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device):
        return {"device": None}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Tail):
        held = value.read()
        return {"tail": [_pack(x, f"{name}.{x_name}", tensors) for x_name, x in vars(held).items()]}
    for kind, part in _PARTS.items():
        if isinstance(value, part):
            columns = {
                _NAMES_ON_DISK.get(f.name, f.name): getattr(value, f.name) for f in fields(part)
            }
            return {"part": kind, "of": _pack(columns, name, tensors)}
    if isinstance(value, tuple | list):
        items = [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, dict):
        pairs = [[k, _pack(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        return {"dict": pairs}
    raise CachepressError(f"a cache that holds a {type(value).__name__} cannot be saved")


def _unpack(packed: object, unused: dict[str, Tensor], device: torch.device) -> object:
    """Unpack a value from JSON; each tensor is taken out of ``unused``, so that it is used once."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = [(k, v) for k, v in packed.items() if k != "of"]
    if kind == "tensor":
        return unused.pop(content).to(device)
    if kind == "device":
        return device
    if kind == "dtype":
        return _dtype_named(content)
    if kind == "part":
        return _part(content, _unpack(packed["of"], unused, device))
    if kind == "dict":
        found = {k: _unpack(v, unused, device) for k, v in content}
        if len(found) < len(content):
            raise ValueError("two values of one name")
        return found
    return _sequence(kind, [_unpack(item, unused, device) for item in content])


def _dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return dtype


def _part(kind: str, columns: object) -> object:
    """Rebuild a segment, codec or other part of a layer from its saved fields."""
    columns = _named_today(cast(dict[str, Any], columns))
    if kind == "Block":
        check_pages(columns)
    return _PARTS[kind](**columns)


def _sequence(kind: str, items: list[object]) -> object:
    if kind == "tail":
        keys, values = cast(list[Tensor], items)
        return Tail.of(keys, values)
    if kind not in ("tuple", "list"):
        raise ValueError(f"{kind} is no kind of value")
    return tuple(items) if kind == "tuple" else items


def _read(path: Path, device: torch.device) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = file.keys()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise CachepressError(f"{path}: there is no such file") from error
    except (OSError, SafetensorError) as error:
        raise CachepressError(f"{path} is damaged or not a safetensors file: {error}") from error


def _fingerprint_of_0_1_0(model: PreTrainedModel) -> str:
    """Hash a model's class and the first numbers of every weight, as version 0.1.0 did."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, x in model.named_parameters():
        sample = x.detach().flatten()[:_SAMPLE].float().cpu()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
