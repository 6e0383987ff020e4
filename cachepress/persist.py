"""Caches on disk: a compressed document, reused in another process."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from cachepress.errors import CachepressError
from cachepress.hf import attach
from cachepress.ops.ragged_attention import Layout
from cachepress.stores import Codec, Store
from cachepress.stores.block import Block
from cachepress.stores.codec import Quantized
from cachepress.stores.tail import Tail
from cachepress.trace import Trace

_FORMAT = "cachepress-cache-1"
_SAMPLE = 64
_PARTS = {part.__name__: part for part in (Block, Codec, Layout, Quantized)}


def save_cache(cache: Cache, path: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Write a cache to a safetensors file.

    Layers that are not compressed (sliding windows, recurrent states) are written too. The file is
    complete or it is not there.

    Args:
        cache: a cache that was filled by the model.
        path: where to write.
        model: the model; its fingerprint goes into the file.

    Raises:
        CachepressError: if the cache is empty or the file cannot be written.
    """
    if not cache.get_seq_length():
        raise CachepressError("the cache is empty: run a forward with it first")
    tensors: dict[str, Tensor] = {}
    layers = [
        [type(layer).__name__, _pack(_state(layer), str(i), tensors)]
        for i, layer in enumerate(cache.layers)
    ]
    tensors = {name: x.detach().contiguous().clone() for name, x in tensors.items()}
    metadata = {
        "format": _FORMAT,
        "model": _fingerprint(model),
        "model_class": type(model).__name__,
        "layers": json.dumps(layers),
        "checksum": _checksum(tensors),
    }
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    try:
        save_file(tensors, partial, metadata)
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise CachepressError(f"cannot write the cache to {target}: {error}") from error


def load_cache(path: str | os.PathLike[str], model: PreTrainedModel) -> Cache:
    """Read a cache that ``save_cache`` wrote, for the model that filled it.

    Args:
        path: the file.
        model: the same model, with the same weights and dtype.

    Returns:
        The cache, on the model's device; the model is ready to read it.

    Raises:
        CachepressError: if the file is missing, damaged, no cache, or of another model.
    """
    metadata, tensors = _read(Path(path), model.device)
    if metadata.get("format") != _FORMAT:
        raise CachepressError(f"{path} is not a cache that save_cache wrote")
    if metadata["checksum"] != _checksum(tensors):
        raise CachepressError(f"{path} is damaged: its content does not match its checksum")
    if metadata["model"] != _fingerprint(model):
        raise CachepressError(
            f"{path} was filled by another model ({metadata['model_class']}, or other weights or "
            f"dtype) than this {type(model).__name__}: load the model that it was made with"
        )
    attach(model)
    cache = DynamicCache(config=model.get_decoder().config)
    for i, (kind, packed) in enumerate(json.loads(metadata["layers"])):
        if kind == Store.__name__:
            cache.layers[i] = Store()
        if type(cache.layers[i]).__name__ != kind:
            raise CachepressError(f"{path} has a {kind} where this model has none")
        vars(cache.layers[i]).update(_unpack(packed, tensors, model.device))  # type: ignore
    return cache


def _state(layer: object) -> dict[str, object]:
    """What a layer is made of; a trace is about a turn that is not over, and is left out."""
    return {name: None if isinstance(x, Trace) else x for name, x in vars(layer).items()}


def _pack(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """A value as JSON; its tensors go to ``tensors``, under names that begin with ``name``."""
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
        rows = value.read()
        return {"tail": [_pack(x, f"{name}.{x_name}", tensors) for x_name, x in vars(rows).items()]}
    if type(value) in _PARTS.values():
        parts = {f.name: getattr(value, f.name) for f in fields(value)}  # type: ignore
        return {"part": type(value).__name__, "of": _pack(parts, name, tensors)}
    if isinstance(value, tuple | list):
        items = [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, dict):
        pairs = [[k, _pack(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        return {"dict": pairs}
    raise CachepressError(f"a cache that holds a {type(value).__name__} cannot be saved")


def _unpack(packed: object, tensors: Mapping[str, Tensor], device: torch.device) -> object:
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = [(k, v) for k, v in packed.items() if k != "of"]
    if kind == "tensor":
        return tensors[content]
    if kind == "device":
        return device
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "dict":
        return {k: _unpack(v, tensors, device) for k, v in content}
    if kind == "part":
        return _PARTS[content](**_unpack(packed["of"], tensors, device))  # type: ignore
    items = [_unpack(item, tensors, device) for item in content]
    if kind == "tail":
        return Tail.of(*items)  # type: ignore
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


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].contiguous().cpu()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fingerprint(model: PreTrainedModel) -> str:
    """What tells this model from others: its class and the first numbers of every weight."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, x in model.named_parameters():
        sample = x.detach().flatten()[:_SAMPLE].float().cpu()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
