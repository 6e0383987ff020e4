"""Synchronisation with a device, and numbers that get there without."""

import torch
from torch import Tensor


def wait(device: torch.device) -> None:
    """Wait until a device finished all queued work, so that times measured are true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Bring numbers from the host to a device, which is not waited for."""
    if numbers.device == device or device.type != "cuda":
        return numbers.to(device)
    first = numbers.flatten()[:1]
    if numbers.numel() and bool((numbers == first).all()):  # A launch is sooner than pinned memory.
        return torch.full(numbers.shape, first.item(), dtype=numbers.dtype, device=device)
    return numbers.pin_memory().to(device, non_blocking=True)


class Ahead:
    """A few numbers of a device that are brought to the host before anybody asks for them.

    The device is not waited for, unless it has not even come to the request when they are read.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers = host.copy_(numbers, non_blocking=True).numpy()
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(numbers.device))
        else:
            self._numbers = numbers.detach().cpu().numpy().copy()

    def __reduce__(self) -> tuple[type["Ahead"], tuple[Tensor]]:
        """Pickle and copy as numbers that have come."""
        return Ahead, (torch.tensor(self.read()),)

    def read(self) -> list[float]:
        """Return the numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()


def known_counts(counts: Tensor, bound: int) -> list[int]:
    """Return numbers that none of ``counts`` exceeds: themselves, where that waits for no device.

    What is in the host's memory can be asked for. Of a device all are as high as the ``bound``, so
    that more may be computed there, and nothing is waited for.
    """
    return counts.flatten().tolist() if counts.device.type == "cpu" else [bound] * counts.numel()
