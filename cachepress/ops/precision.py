"""The precision that scores, sums and attention are computed in."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for float64, else float32: sums of half types would be rounded."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """Convert ``x`` to the precision of computation; the same tensor if it has that already."""
    return x.to(wide_dtype(x))
