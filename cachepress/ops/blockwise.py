"""Walks over the tokens of a layer in blocks, so that what is made on the way stays small.

A copy of all keys in float32 has hundreds of times the size of their scores. Whatever is computed
from each key or value is therefore computed of one block of tokens after the other; blocks are
large enough to keep a GPU busy.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cachepress.ops.precision import wide_dtype

AT_ONCE = 1 << 22
"""Numbers of a block's largest intermediate: 16 MiB in float32, 32 MiB in float64."""


def blocks(n: int, each: int, most: int | None = None) -> Iterator[slice]:
    """Cut ``n`` tokens into blocks, of at most ``most`` where that is given.

    Args:
        n: number of tokens.
        each: numbers that the largest intermediate has for a token.
        most: the most tokens of a block; None for as many as ``each`` allows.
    """
    step = max(1, AT_ONCE // max(1, each))
    step = step if most is None else min(step, most)
    for start in range(0, max(1, n), step):
        yield slice(start, min(start + step, n))


def by_token(compute: Callable[..., Tensor], *given: Tensor, each: int | None = None) -> Tensor:
    """Compute ``[..., T]`` from tensors ``[B, H, T, ...]``, one block of tokens at a time.

    Args:
        compute: computes ``[..., n]`` from the tensors' blocks ``[B, H, n, ...]``.
        given: the tensors.
        each: numbers that the largest intermediate has for a token; None for those of the first
            tensor.
    """
    t = given[0].shape[2]
    each = given[0].numel() // max(1, t) if each is None else each
    parts = [compute(*(x[:, :, some] for x in given)) for some in blocks(t, each)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def norms(x: Tensor) -> Tensor:
    """Compute the L2 norms ``[B, H, T]`` of ``x [B, H, T, D]``, in float32 at least."""
    dtype = wide_dtype(x)
    return by_token(lambda part: torch.linalg.vector_norm(part, dim=-1, dtype=dtype), x)
