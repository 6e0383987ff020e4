"""Steps on some of the layers against transformers' own caches: dynamic, and static and compiled.

The compiler takes as long for a layer as for a model's shape allows, so some of the layers are
enough to compare.
"""

from functools import partial

import torch
from transformers import StaticCache

from benchmarks.card.decode import PLAIN
from benchmarks.card.lab import (
    ADA_90,
    COMPILED,
    DYNAMIC,
    EAGER,
    RECORDED,
    WHOLE,
    Cells,
    Kind,
    Lab,
    stepping,
)
from benchmarks.card.records import Values
from benchmarks.card.timing import loop_seconds
from cachepress.hf import cache_argument
from cachepress.measure import Stopwatch, bytes_of_step

STATIC = "StaticCache, compiled"
ROOM = 256
"""Tokens that the static cache has room for after the context."""


def static(lab: Lab) -> Cells:
    """Give a cell for each cache."""
    length = lab.sizes.long
    for kind, mode in ((DYNAMIC, PLAIN), (ADA_90, RECORDED), (WHOLE, RECORDED), (ADA_90, EAGER)):
        yield f"{kind.name}, {mode}, {length}", partial(of_kind, lab, kind, mode, length)
    for n in (length, lab.sizes.short):
        yield f"{STATIC}, {n}", partial(of_static, lab, n)
    yield f"{ADA_90.name}, {COMPILED}, {length}", partial(of_kind, lab, ADA_90, COMPILED, length)


def of_kind(lab: Lab, kind: Kind, mode: str, length: int) -> Values:
    """Measure a loop of steps on some of the layers."""
    model = lab.model(lab.sizes.some_layers)
    cache, token = lab.prefill(kind, length, lab.sizes.some_layers), lab.ids(length)[:, :1]
    limit = bytes_of_step(model, cache) / lab.copy
    with stepping(mode):
        seconds = loop_seconds(model, cache, token, lab.sizes.steps)
    return _values(kind.name, mode, length, seconds, limit)


def of_static(lab: Lab, length: int) -> Values:
    """Measure a loop of steps with a static cache and a compiled forward."""
    model, ids = lab.model(lab.sizes.some_layers), lab.ids(length)
    cache = StaticCache(config=model.config, max_cache_len=length + ROOM)
    name = cache_argument(model)
    with torch.no_grad():
        model(ids, logits_to_keep=1, **{name: cache})
        limit = bytes_of_step(model, cache) / lab.copy
        options = {"mode": "reduce-overhead"} if lab.is_gpu else {"backend": "eager"}
        forward = torch.compile(model.forward, fullgraph=True, **options)
        position = torch.full((1, 1), length, device=lab.device)
        token = ids[:, :1].clone()

        def step() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            forward(input_ids=token, position_ids=position, **{name: cache})

        with Stopwatch(lab.device) as compiling:
            for _ in range(4):
                step()
        with Stopwatch(lab.device) as stopwatch:
            for _ in range(lab.sizes.steps):
                step()
    torch.compiler.reset()
    seconds = stopwatch.seconds / lab.sizes.steps
    return {**_values(STATIC, COMPILED, length, seconds, limit), "compiling_s": compiling.seconds}


def _values(cache: str, mode: str, length: int, seconds: float, limit: float) -> Values:
    return {
        "cache": cache,
        "mode": mode,
        "length": length,
        "ms": 1e3 * seconds,
        "limit_ms": 1e3 * limit,
        "of_limit": seconds / limit,
    }
