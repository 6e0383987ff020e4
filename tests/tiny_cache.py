"""Small helpers of the tests: run a forward, read a cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.hf import cache_argument
from cachepress.presses import BasePress
from tests.bounds import close


def forward(model: PreTrainedModel, cache: Cache | None = None, **inputs: object) -> object:
    """A forward without gradients, the cache under this version's argument name."""
    if cache is not None:
        inputs[cache_argument(model)] = cache
    with torch.no_grad():
        return model(**inputs)


def pressed(model: PreTrainedModel, press: BasePress, ids: Tensor, **inputs: object) -> Cache:
    """A cache with ``ids`` compressed by ``press``."""
    cache = DynamicCache()
    with press(model):
        forward(model, cache, input_ids=ids, **inputs)
    return cache


def kept(cache: Cache) -> list[list[list[list[int]]]]:
    """Positions held, by layer, sequence and head; empty slots left out."""
    return [
        [[[p for p in head if p >= 0] for head in row] for row in store.positions.tolist()]
        for store in compressed_layers(cache)
    ]


@contextmanager
def recorded_as(recorded: bool) -> Iterator[None]:
    """Record decoded steps within the block, or do not; they are recorded after it."""
    cp.configure(recorded=recorded)
    try:
        yield
    finally:
        cp.configure(recorded=True)


def go_on(model: PreTrainedModel, cache: Cache, ids: Tensor) -> list[Tensor]:
    """Logits of each of the tokens ``[B, n]``, decoded one after the other."""
    return [forward(model, cache, input_ids=token).logits for token in ids.split(1, dim=1)]


def goes_on_as(model: PreTrainedModel, cache: Cache, each: Sequence[Cache], ids: Tensor) -> None:
    """The sequences of a cache go on as caches of one do, which stay as they are."""
    wanted = [go_on(model, cp.fork(one), text[None]) for one, text in zip(each, ids, strict=True)]
    for step, logits in enumerate(go_on(model, cache, ids)):
        for row, own in zip(logits, wanted, strict=True):
            close(row, own[step][0])


def allocated(store: object) -> int:
    """Bytes of every tensor that can be reached from a layer: found by walking, not by asking."""
    found: dict[int, int] = {}
    seen, todo = set(), [store]
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, Tensor) and x.untyped_storage().nbytes():
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, list | tuple):
            todo += x
        elif hasattr(x, "__dict__"):
            todo += vars(x).values()
    return sum(found.values())
