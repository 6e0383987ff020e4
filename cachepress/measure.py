"""Measures seconds, bandwidth and peak memory, on a CPU or a GPU, and names the machine.

Every time that cachepress reports is taken by one ``Stopwatch``, so that all are comparable.
"""

import ctypes
import gc
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import torch
from torch import Tensor

import cachepress
from cachepress.cache.layer import CompressedLayer
from cachepress.ops import wait
from cachepress.ops.paged_attention import PAGE

if TYPE_CHECKING:
    from cachepress.hf.types import Cache, PreTrainedModel

COPIED = {"cuda": 2**31, "cpu": 2**27}
"""Bytes that are copied to measure a bandwidth: many times what caches of a chip hold."""


class Stopwatch:
    """Adds up the seconds while it is entered; waits for the device's queued work at both ends.

    Args:
        device: the device that does the work.

    Attributes:
        seconds: the seconds so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._start = device, 0.0, 0.0

    def __enter__(self) -> Self:
        wait(self.device)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        wait(self.device)
        self.seconds += time.perf_counter() - self._start


def copy_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Measure the bandwidth of a copy on a device, in bytes a second: those read and those written.

    The best of ``repeats``, since nothing makes a copy faster than the memory is.
    """
    size = COPIED.get(device.type, COPIED["cpu"])
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best = 0.0
    for _ in range(repeats):
        with Stopwatch(device) as stopwatch:
            target.copy_(source)
        best = max(best, 2 * size / stopwatch.seconds)
    return best


def bytes_of_step(model: "PreTrainedModel", cache: "Cache") -> int:
    """Compute the bytes that decoding a token has to read: the weights, and the pairs held.

    Of the table of embeddings it reads a row. Pairs that sequences share count once. Of pages of
    which a few are chosen, it reads those, and the bounds of all.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    own, head = (None if part is None else cast(Tensor, part.weight) for part in tables)
    unread = 0 if own is None or head is None or own is head else own.nbytes
    weights = sum(x.nbytes for x in model.parameters()) - unread
    return weights + sum(_bytes_of_layer(layer) for layer in cache.layers)


def _bytes_of_layer(layer: object) -> int:
    """Compute the bytes of pairs that a step reads of a cache layer."""
    if not isinstance(layer, CompressedLayer):
        found = (getattr(layer, name, None) for name in ("keys", "values"))
        return sum(x.nbytes for x in found if x is not None)
    if layer.codec is not None:
        return layer.nbytes
    lengths = layer.lengths
    pair = layer.whole_nbytes // (layer.get_seq_length() * lengths.numel())
    if layer.page_budget is None:
        return min(int(lengths.sum()) * pair, layer.nbytes)
    chosen, pages = lengths.clamp(max=layer.page_budget * PAGE), -(-lengths // PAGE)
    # The bounds of a page are two numbers for each channel of its keys, as many as a pair has.
    return int((chosen + pages).sum()) * pair


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Measure the peak of allocated memory above that at the start, in bytes, as a list of one.

    It stays 0 where the system does not tell.
    """
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
        return
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        # Memory that was freed but not returned to the system would hide what is allocated now.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
        before = _status_bytes(status, "VmRSS")
    except (OSError, AttributeError):
        yield peak
        return
    yield peak
    peak[0] = max(0, _status_bytes(status, "VmHWM") - before)


def process_peak_memory(device: torch.device) -> int:
    """Return the peak of allocated memory since the start: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine_of(model: "PreTrainedModel") -> str:
    """Name a model, the machine and the versions of the libraries, for tables and files."""
    device = model.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(model.device)
    return (
        f"{type(model).__name__} of {model.num_parameters() / 1e6:.0f}M, {model.dtype}, {device}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"torch {torch.__version__}, transformers {version('transformers')}, cachepress "
        f"{cachepress.__version__}"
    )


def _status_bytes(status: Path, name: str) -> int:
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
