"""Reorders the rows of tensors."""

from torch import Tensor


def valid_last(flags: Tensor) -> Tensor:
    """Sort the last axis by a flag, flagged entries last (stable): the order."""
    return flags.byte().argsort(dim=-1, stable=True)


def gather(x: Tensor, order: Tensor) -> Tensor:
    """Gather the rows of ``x [B, X, T, D]`` in the order ``[B, X or 1, T]``."""
    return x.gather(2, order.unsqueeze(-1).expand(*x.shape[:2], -1, x.shape[-1]))
