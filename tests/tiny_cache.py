"""Small helpers of the tests: run a forward, read a cache."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from cachepress.cache import stores
from cachepress.hf import cache_argument
from cachepress.presses import BasePress


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
        for store in stores(cache)
    ]
