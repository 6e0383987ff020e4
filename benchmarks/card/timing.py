"""Times steps and short pieces of work so that the device, and not the clock, is measured."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

import cachepress as cp
from cachepress.hf import cache_argument
from cachepress.measure import Stopwatch

WARM = 10
"""Steps before the first that counts; a step is recorded after a few."""
PARTS = 3
LEAST = 0.02
"""Seconds that a piece of work is repeated for, in each of its measurements."""


def seconds_of(work: Callable[[], object], device: torch.device, least: float = LEAST) -> float:
    """Time work that may take microseconds: the best mean of three rounds of repeats."""
    for _ in range(3):
        work()
    n = 1
    while (seconds := _repeated(work, device, n)) < least and n < 10_000:
        n = max(2 * n, int(n * least / max(seconds, 1e-6)))
    return min(seconds / n, *(_repeated(work, device, n) / n for _ in range(2)))


def _repeated(work: Callable[[], object], device: torch.device, n: int) -> float:
    with Stopwatch(device) as stopwatch:
        for _ in range(n):
            work()
    return stopwatch.seconds


def graphed(work: Callable[[], object]) -> Callable[[], None]:
    """Capture work as a CUDA graph, so that its launches take the host no time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def loop_seconds(model: PreTrainedModel, cache: Cache, token: Tensor, steps: int) -> float:
    """Decode greedily by ``cachepress.decode``, and return the median seconds of a token.

    The device is waited for at the ends of ``PARTS`` parts of the steps, not at each.
    """
    each, found = max(1, steps // PARTS), []
    for part in range(PARTS + 1):
        n = each if part else WARM
        with Stopwatch(model.device) as stopwatch:
            token = cp.decode(model, cache, token, n, eos_token_id=[])[:, -1:]
        if part:
            found.append(stopwatch.seconds / each)
    return statistics.median(found)


def generate_seconds(
    model: PreTrainedModel, ids: Tensor, again: Callable[[], Cache], steps: int
) -> float:
    """Time a token of transformers' greedy ``generate``, by two runs of different lengths.

    One more comes first, in which steps are compiled and recorded.

    Args:
        model: the model.
        ids: ``[B, n + 1]`` the text.
        again: gives a cache that holds the text but for its last token.
        steps: decoded tokens by which the runs differ.
    """
    taken = []
    for new in (WARM, WARM, WARM + steps):
        cache = again()
        with Stopwatch(model.device) as stopwatch:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **{cache_argument(model): cache},
            )
        taken.append(stopwatch.seconds)
    return (taken[2] - taken[1]) / steps
