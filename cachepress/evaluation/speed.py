"""How long decoding one token takes after a context, and how much memory was needed."""

import resource
import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from cachepress.bench import timed_step
from cachepress.cache import fork
from cachepress.presses import BasePress

CONTEXTS = 1
"""Contexts of a data set after which steps are timed."""
STEPS = 8


class StepSeconds(NamedTuple):
    """Seconds of a decoded token: the median of several, and their quartiles."""

    median: float
    low: float
    high: float


def step_seconds(
    model: PreTrainedModel, caches: Sequence[tuple[Cache, BasePress | None]]
) -> list[StepSeconds]:
    """Seconds of a decoded token after each cache, taken in turns.

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
                with press(model, turns="first") if press else nullcontext():
                    seconds = timed_step(model, token, cache)
                if step:  # The first one allocates.
                    found.append(seconds)
    quartiles = [statistics.quantiles(found, n=4, method="inclusive") for found in times]
    return [StepSeconds(median, low, high) for low, median, high in quartiles]


def peak_memory(device: torch.device) -> int:
    """The most bytes that were allocated: on the GPU, or by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
