"""Reorders the rows of tensors."""

from torch import Tensor


def valid_last(flags: Tensor) -> Tensor:
    """Sort the last axis by a flag, flagged entries last (stable): the order."""
    return flags.byte().argsort(dim=-1, stable=True)


def gather(x: Tensor, order: Tensor) -> Tensor:
    """Gather the rows of ``x [B, X, T, D]`` in the order ``[B, X or 1, T]``."""
    return x.gather(2, order.unsqueeze(-1).expand(*x.shape[:2], -1, x.shape[-1]))


def entries_of(x: Tensor, entries: Tensor) -> Tensor:
    """Gather some of the ``B * H * T`` entries of ``x [B, H, T, ...]``."""
    _, h, t = x.shape[:3]
    if x.is_contiguous():
        return x.flatten(0, 2).index_select(0, entries)
    return x[entries // (h * t), entries // t % h, entries % t]
