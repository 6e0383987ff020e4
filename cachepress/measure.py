"""Measures seconds and peak memory, on a CPU or a GPU.

Every time that cachepress reports is taken by one ``Stopwatch``, so that all are comparable.
"""

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


def _status_bytes(status: Path, name: str) -> int:
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
