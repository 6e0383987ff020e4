"""Measures of time and memory: one stopwatch for all seconds, and the peak of what is allocated."""

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch

from cachepress.ops import wait


class Stopwatch:
    """Adds up seconds while it is entered; the device's work is waited for at both ends.

    Args:
        device: where the work is done.

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
    """Most bytes above those at the start; 0 where the system does not tell."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
        return
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        # What earlier runs freed would hide what this one needs.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
        before = _status_bytes(status, "VmRSS")
    except (OSError, AttributeError):
        yield peak
        return
    yield peak
    peak[0] = max(0, _status_bytes(status, "VmHWM") - before)


def _status_bytes(status: Path, name: str) -> int:
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
