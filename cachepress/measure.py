"""Measures seconds and peak memory, on a CPU or a GPU, and names the machine.

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
from typing import TYPE_CHECKING, Self

import torch

import cachepress
from cachepress.ops import wait

if TYPE_CHECKING:
    from cachepress.hf.types import PreTrainedModel


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
