"""Saved caches with another content, and the checksum that such a content has."""

import contextlib
import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

import cachepress as cp
from cachepress.artefacts.digests import checksum_of
from tests.counting import CountingPress
from tests.tiny import tiny, tokenizer, tokens
from tests.tiny_cache import forward

Tensors = dict[str, Tensor]
HUGE = [10**5, 10**9, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30]
SCALARS = [*HUGE, -1, 0, 1, 2, 3, 8, 31, 32, 33, 40, 64, 0.5, 1e300, True, False, None, "", "x"]
SCALARS += ["int4", "0", "Store", "KnormPress", [], {}, {"tensor": "x"}, {"dtype": "int8"}]
SCALARS += [{"dtype": "float64"}, {"device": None}, {"tuple": []}, {"list": [1]}, {"dict": []}]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
DTYPES += [torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn]

UNCROPPED = (cp.CachepressError, RuntimeError, ValueError)
"""What our layers and those of transformers raise where rows are gone."""


def made() -> dict[str, tuple[PreTrainedModel, Cache]]:
    """A model and a cache of it, of every form that a saved cache can have."""
    found = {}

    def add(name: str, model: PreTrainedModel, cache: Cache, decoded: int = 0) -> None:
        for seed in range(decoded):
            forward(model, cache, input_ids=tokens(1, seed=seed))
        found[name] = (model, cache)

    model, knorm = tiny(), cp.AdaKVPress(cp.KnormPress(0.5))
    text, long = tokens(40), tokens(200)
    add("plain", model, cp.prefill(model, text, knorm))
    add("whole", model, cp.prefill(model, text))
    add("decoded", model, cp.prefill(model, text, knorm), decoded=3)
    add("int4", model, cp.prefill(model, long, knorm, storage="int4"))
    add("int2", model, cp.prefill(model, long, knorm, storage="int2"), decoded=110)
    add("pages", model, cp.prefill(model, long, cp.QuestPress(knorm, 1, skip_layers=0)), decoded=3)
    add("channels", model, cp.prefill(model, long, cp.ThinKPress(0.5)))
    add("turned", model, cp.prefill(model, text, cp.KeyRerotationPress(cp.KnormPress(0.5))))
    add("carried", model, cp.prefill(model, text, cp.H2OPress(0.5)))
    add("biased", model, cp.prefill(model, text, CountingPress(0.5)))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    two = tokens(40, batch=2)
    add("padded", model, cp.prefill(model, two, knorm, attention_mask=mask), decoded=0)
    add("forked", model, cp.fork(cp.prefill(model, text, knorm), 3))
    for name in ("gemma3", "qwen3_next", "gpt2"):
        other = tiny(name)
        add(name, other, cp.prefill(other, text, knorm))
    if hasattr(Cache, "activate_past_recording"):
        other = tiny("gemma3")
        recorded = cp.prefill(other, text, knorm)
        recorded.activate_past_recording()
        add("recorded", other, recorded, decoded=3)
    return found


def rewritten(path: Path, change: Callable[[list, Tensors], object]) -> None:
    """Change the layers and tensors of a saved cache, and give it the checksum of the result."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["header"])
    change(header["layers"], tensors)
    tensors = {name: x.contiguous().clone() for name, x in tensors.items()}
    metadata["header"] = json.dumps(header)
    metadata["checksum"] = checksum_of(tensors, metadata["header"])
    save_file(tensors, path, metadata)


def forge(draw: random.Random, layers: list, tensors: Tensors) -> None:
    """Change one thing, or a few, anywhere."""
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if draw.random() < 0.55:
            _forge_header(draw, layers)
        elif tensors:
            forge_tensor(draw, tensors)


def use(model: PreTrainedModel, cache: Cache, folder: Path) -> None:
    """Do with a cache what can be done with one."""
    n = max(1, getattr(cache.layers[0], "batch_size", 1))
    cp.size_of(cache)
    cp.cache.batch.text_of(cache)
    for ids in (tokens(1), tokens(3), tokens(20)):
        branch = cp.fork(cache)
        forward(model, branch, input_ids=ids.repeat(n, 1))
        forward(model, branch, input_ids=ids[:, :1].repeat(n, 1))
    forward(model, cp.fork(cache, 2), input_ids=tokens(1).repeat(2, 1)) if n == 1 else None
    branch = cp.fork(cache)
    with contextlib.suppress(*UNCROPPED):
        branch.crop(-1)
    branch = cp.fork(cache)
    cp.prefill(model, tokens(20).repeat(n, 1), cp.SnapKVPress(0.5, window_size=4), branch)
    forward(model, branch, input_ids=tokens(1).repeat(n, 1))
    if n == 1:
        cp.ask(model, tokenizer(), cache, "w5 w6", max_new_tokens=2)
    cp.save_cache(cache, folder / "again", model)
    cp.load_cache(folder / "again", model)


def _places(value: object) -> Iterator[tuple[list | dict, int | str]]:
    """Every place in a header that holds a value."""
    if isinstance(value, list | dict):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield value, key
            yield from _places(inner)


def _forge_header(draw: random.Random, layers: list) -> None:
    places = list(_places(layers))
    if not places:
        return
    # Scalars are what there are most of, and most of them are names: numbers get their turn.
    numbers = [(where, key) for where, key in places if type(where[key]) in (int, bool)]
    if numbers and draw.random() < 0.5:
        places = numbers
    where, key = draw.choice(places)
    name, way = where[key], draw.randrange(8)
    if way == 0 and isinstance(where, list):
        where.pop(key)
    elif way == 1 and isinstance(where, list):
        where.insert(key, copy.deepcopy(name))
    elif way == 2:
        other, place = draw.choice(places)
        where[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(where[key])
    elif way == 3 and isinstance(where, dict):
        where[draw.choice(["tensor", "dict", "tuple", "tail", "part", "list"])] = where.pop(key)
    elif way == 4 and isinstance(name, int):
        where[key] = name + draw.choice([-1, 1, 7, -7, 32])
    elif way == 5:
        where[key] = {"tuple": [copy.deepcopy(name)]}
    else:
        where[key] = copy.deepcopy(draw.choice(SCALARS))


def forge_tensor(draw: random.Random, tensors: Tensors) -> None:
    """Change one of some tensors: its type, its shape, its place, or its numbers."""
    name = draw.choice(list(tensors))
    x, way = tensors[name], draw.randrange(9)
    if way == 0:
        del tensors[name]
    elif way == 1:
        tensors[name] = x.to(draw.choice(DTYPES))
    elif way == 2 and x.ndim:
        at = draw.randrange(x.ndim)
        tensors[name] = x.narrow(at, 0, draw.randint(0, x.shape[at]))
    elif way == 3 and x.ndim:
        tensors[name] = torch.cat([x, x], dim=draw.randrange(x.ndim))
    elif way == 4:
        other = draw.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], x
    elif way == 5:
        tensors[name] = x.flatten() if draw.random() < 0.5 else x.unsqueeze(0)
    elif way == 6 and x.ndim > 1:
        tensors[name] = x.transpose(draw.randrange(x.ndim), draw.randrange(x.ndim))
    elif x.numel():
        flat = x.clone().reshape(-1)
        for _ in range(draw.choice([1, 3, len(flat)])):
            flat[draw.randrange(len(flat))] = _number(draw, x.dtype)
        tensors[name] = flat.view(x.shape)


def _number(draw: random.Random, dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return draw.random() < 0.5
    if dtype.is_floating_point:
        return draw.choice([float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -3e4])
    most = torch.iinfo(dtype).max
    return draw.choice([0, 1, 5, 39, 40, 41, 96, 97, most, torch.iinfo(dtype).min, most // 2])
