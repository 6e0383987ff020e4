"""Fingerprints of loaded models: a digest of the config and of all bits of all weights."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cachepress.hf.types import TRANSFORMERS_VERSION, PreTrainedModel, PreTrainedTokenizerBase

_CHUNK = 1 << 22
_LINE = 1 << 10
_SAMPLED = 1 << 11
_WORD = 8
_IDLE = frozenset(
    (
        *("architectures", "auto_map", "dtype", "finetuning_task", "id2label", "label2id"),
        *("initializer_range", "name_or_path", "output_attentions", "output_hidden_states"),
        *("problem_type", "return_dict", "task_specific_params", "tokenizer_class"),
        *("torch_dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id"),
        *("pad_token_id", "sep_token_id", "decoder_start_token_id"),
    )
)
"""Fields of a config that change nothing in a forward."""
_REMEMBERED: WeakKeyDictionary[nn.Module, dict[tuple[str, torch.dtype | None], tuple[object, str]]]
_REMEMBERED = WeakKeyDictionary()


def weights_digest(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Hash the name, type, shape and all bits of every weight.

    The bits are summed as 64-bit integers, plainly and weighted by their place, on the weights'
    own device: integers have the same sum in any order, on any device. The sums of a weight are
    remembered until its version, its memory or a sample of its bits changes.

    Args:
        model: the model.
        dtype: the type that floating-point weights are cast to first; None for as they are.
    """
    remembered = _REMEMBERED.setdefault(model, {})
    weights = dict(_weights(model))
    marks = _marks(weights)
    new = {}
    for name, x in weights.items():
        if remembered.get((name, dtype), (None,))[0] != marks[name]:
            new[name] = _sums(x, dtype)
    for name, sums in zip(new, _numbers(list(new.values())), strict=True):
        x = weights[name]
        of = dtype if dtype is not None and x.is_floating_point() else x.dtype
        remembered[name, dtype] = (marks[name], f"{of} {tuple(x.shape)} {sums}")
    text = json.dumps({name: remembered[name, dtype][1] for name in sorted(weights)})
    return hashlib.sha256(text.encode()).hexdigest()


def acting_config(model: PreTrainedModel) -> dict[str, object]:
    """Return the fields of a config that affect a forward: no names, paths or versions."""
    text = json.dumps(_acting(model.config.to_dict()), default=str, sort_keys=True)
    return json.loads(text)


def loaded_digests(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return digests of a model and a tokenizer in memory, as ``model_digests`` does of files."""
    generation = getattr(model, "generation_config", None)
    told = {} if generation is None else _acting(generation.to_dict(), special=True)
    parts = [type(model).__name__, acting_config(model), told, weights_digest(model)]
    return {"weights": f"loaded {_hash(parts)}", "tokenizer": f"loaded {_hash(_told(tokenizer))}"}


def fingerprint(model: PreTrainedModel) -> dict[str, object]:
    """Return what tells a model from every other one, as JSON types."""
    dtypes = {str(x.dtype).removeprefix("torch.") for x in model.parameters()}
    return {
        "class": type(model).__name__,
        "dtypes": sorted(dtypes),
        "config": acting_config(model),
        "weights": weights_digest(model),
        "transformers": TRANSFORMERS_VERSION,
    }


def other_model(saved: Mapping[str, object], model: PreTrainedModel) -> str | None:
    """Say in what a model differs from one whose fingerprint was saved; None if in nothing."""
    own = fingerprint(model)
    for name in ("class", "dtypes"):
        if saved[name] != own[name]:
            return f"its {name}: {saved[name]}, here {own[name]}"
    # Another version of transformers may know other fields.
    same = saved["transformers"] == own["transformers"]
    if (field := _difference(saved["config"], own["config"], same)) is not None:
        return f"its config has another {field}"
    return None if saved["weights"] == own["weights"] else "other weights"


def _difference(saved: object, own: object, whole: bool, name: str = "") -> str | None:
    """Find the first field that differs; fields that one side lacks count only if ``whole``."""
    if not isinstance(saved, dict) or not isinstance(own, dict):
        return None if saved == own else name
    for key in sorted({*saved, *own}):
        if key in saved and key in own:
            found = _difference(saved[key], own[key], whole, f"{name}.{key}".strip("."))
            if found is not None:
                return found
        elif whole:
            return f"{name}.{key}".strip(".")
    return None


def _told(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    special = tokenizer.special_tokens_map
    return [type(tokenizer).__name__, words, tokenizer.chat_template, special]


def _hash(values: list[object]) -> str:
    return hashlib.sha256(json.dumps(values, default=str, sort_keys=True).encode()).hexdigest()


def _acting(config: Mapping[str, object], special: bool = False) -> dict[str, object]:
    """Keep the fields that affect a forward, or with ``special`` tokens, generation."""
    return {
        str(name): _acting(value, special) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if not str(name).startswith("_")
        and (name not in _IDLE or (special and str(name).endswith("_token_id")))
    }


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over every parameter and saved buffer; those of tensor subclasses one by one."""
    for name, x in model.state_dict(keep_vars=True).items():
        if isinstance(x, Tensor):
            yield from _plain(name, x)


def _plain(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not hasattr(x, "__tensor_flatten__"):
        yield name, x
        return
    for inner in x.__tensor_flatten__()[0]:  # type: ignore
        yield from _plain(f"{name}.{inner}", getattr(x, inner))


def _marks(weights: Mapping[str, Tensor]) -> dict[str, object]:
    """Return, for each weight, a mark that changes when the weight does.

    PyTorch's version counter misses what is written through ``.data``, which a sample of bits
    mostly shows. Weights made in inference mode have no version, so that they always count as
    changed.
    """
    samples = _numbers([_sample(x) for x in weights.values()])
    return {
        name: (
            object() if x.is_inference() else x._version,
            None if x.is_meta else x.data_ptr(),
            (x.dtype, x.shape, x.stride(), str(x.device)),
            sample,
        )
        for (name, x), sample in zip(weights.items(), samples, strict=True)
    }


def _sample(x: Tensor) -> Tensor:
    """Sum some of the bits of a weight, ``[2]``."""
    if x.is_meta or not x.numel():
        return torch.zeros(2, dtype=torch.int64)
    flat = x.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous()
    return _sums(some, None)


def _sums(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Sum the 64-bit words of a weight, and each times its place, ``[2]``."""
    if x.is_meta:
        return torch.zeros(2, dtype=torch.int64)
    flat = x.detach().reshape(-1)
    if dtype is None or not x.is_floating_point():
        return _sums_of(_words(flat))
    total, start = flat.new_zeros(2, dtype=torch.int64), 0
    for part in flat.split(_CHUNK):
        words = _words(part.to(dtype))
        sums = _sums_of(words)
        total += torch.stack([sums[0], sums[1] + start * sums[0]])
        start += len(words)
    return total


def _sums_of(words: Tensor) -> Tensor:
    """Sum words, and each times its place, ``[2]``; both sums wrap around."""
    whole = len(words) // _LINE * _LINE
    tail = torch.cat([words[whole:], words.new_zeros(whole + _LINE - len(words))])
    place = torch.arange(_LINE, dtype=torch.int64, device=words.device)
    plain, placed = [], []
    for lines in (*words[:whole].view(-1, _LINE).split(_CHUNK // _LINE), tail[None]):
        plain.append(lines.sum(1))
        # Integer matrix products exist on a CPU only; there they need no extra memory.
        cpu = lines.device.type == "cpu"
        placed.append(lines.mv(place) if cpu else (lines * place).sum(1))
    each, within = torch.cat(plain), torch.cat(placed)
    first = torch.arange(len(each), dtype=torch.int64, device=words.device) * _LINE
    return torch.stack([each.sum(), within.sum() + (each * first).sum()])


def _words(x: Tensor) -> Tensor:
    """View the bits of a vector as 64-bit integers, padded with zeros."""
    octets = x.contiguous().view(torch.uint8)
    missing = -len(octets) % _WORD
    if missing or octets.storage_offset() % _WORD:
        octets = torch.cat([octets, octets.new_zeros(missing)])
    return octets.view(torch.int64)


def _numbers(sums: list[Tensor]) -> list[tuple[int, int]]:
    """Copy sums from their devices to Python numbers, with one copy from each device."""
    by_device: dict[torch.device, list[int]] = {}
    for i, x in enumerate(sums):
        by_device.setdefault(x.device, []).append(i)
    found: dict[int, tuple[int, int]] = {}
    for places in by_device.values():
        copied = torch.stack([sums[i] for i in places]).tolist()
        found |= {i: (plain, placed) for i, (plain, placed) in zip(places, copied, strict=True)}
    return [found[i] for i in range(len(sums))]
