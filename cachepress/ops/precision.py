"""The precision that scores, sums and attention are computed in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for float64, else float32: sums of half types would be rounded."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """Convert ``x`` to the precision of computation; the same tensor if it has that already."""
    return x.to(wide_dtype(x))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Suspend autocast on a device, which would multiply float32 numbers as a half type."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def narrowest(x: Tensor) -> torch.dtype:
    """Return the type that autocast converts ``x`` to before a product, or its own type."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
