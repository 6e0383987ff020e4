"""Counts what would let the host wait for a device, while something runs on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}


class Waits(TorchDispatchMode):
    """Remembers the operations whose result, or its shape, the host has to know.

    Those of the CPU count only where it stands for a device.
    """

    def __init__(self, cpu_counts: bool = True) -> None:
        super().__init__()
        self.found: list[str] = []
        self._cpu_counts = cpu_counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        waits = name in WAITING or (name == "aten::index" and _by_mask(args[1]))
        if waits and (self._cpu_counts or args[0].device.type != "cpu"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _by_mask(indices) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)
