"""Times decoding from compressed caches."""

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from cachepress.cache.batch import fork, ordinary, size_of
from cachepress.hf import cache_argument
from cachepress.hf.shared_prefill import SharedPrefill
from cachepress.hf.types import Cache, PreTrainedModel
from cachepress.measure import Stopwatch
from cachepress.presses import BasePress

CONTEXTS = 1
"""Contexts of a data set after which steps are timed."""
STEPS = 8


class StepSeconds(NamedTuple):
    """Median and quartiles of the seconds of a decoded token."""

    median: float
    low: float
    high: float


def step_seconds(
    model: PreTrainedModel, caches: Sequence[tuple[Cache, BasePress | None]]
) -> list[StepSeconds]:
    """Time decoding a token from each of several caches, interleaved.

    Args:
        model: the model.
        caches: caches of one sequence, with the press that acts while decoding, if one does; they
            are left as they are.
    """
    branches = [(fork(cache), press) for cache, press in caches]
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    times: list[list[float]] = [[] for _ in caches]
    with torch.no_grad():
        for step in range(STEPS + 1):
            for (cache, press), found in zip(branches, times, strict=True):
                pressed = press(model, turns="first") if press else nullcontext()
                with pressed, Stopwatch(model.device) as stopwatch:
                    model(token, **{cache_argument(model): cache})
                if step:  # The first one allocates.
                    found.append(stopwatch.seconds)
    quartiles = [statistics.quantiles(found, n=4, method="inclusive") for found in times]
    return [StepSeconds(median, low, high) for low, median, high in quartiles]


class SpeedLine(NamedTuple):
    """Speed and size of a cache.

    Attributes:
        press: the press; None for transformers' own uncompressed cache.
        ratio: share of key-value pairs that it evicted.
        seconds: of a decoded token.
        cache_bytes: allocated for keys and values.
    """

    press: BasePress | None
    ratio: float
    seconds: StepSeconds
    cache_bytes: int


def speed_lines(
    model: PreTrainedModel, ids: Tensor, presses: Sequence[BasePress]
) -> list[SpeedLine]:
    """Time decoding after a text: from an uncompressed cache, then under each press.

    Args:
        model: the model.
        ids: the text, ``[1, T]``; it is read once for all.
        presses: presses that act on prompts, and do not look for a question.
    """
    prefill = SharedPrefill(model, presses)
    prefill.read(ids)
    caches: list[Cache] = [ordinary(prefill.cache)]
    caches += [prefill.compressed(press)[0] for press in presses]
    sizes = [size_of(cache) for cache in caches]
    found = step_seconds(model, [(cache, None) for cache in caches])
    return [
        SpeedLine(press, size.ratio, seconds, size.bytes_after)
        for press, size, seconds in zip([None, *presses], sizes, found, strict=True)
    ]
