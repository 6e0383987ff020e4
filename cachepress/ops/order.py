"""Putting the rows of a table in order."""

from torch import Tensor


def valid_last(flags: Tensor) -> Tensor:
    """Order of the last axis that puts the flagged entries last, both groups in their order."""
    return flags.byte().argsort(dim=-1, stable=True)


def gather(x: Tensor, order: Tensor) -> Tensor:
    """Rows of ``x [B, X, T, D]`` in the given order ``[B, X or 1, T]``."""
    return x.gather(2, order.unsqueeze(-1).expand(*x.shape[:2], -1, x.shape[-1]))
