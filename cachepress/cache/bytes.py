"""Bytes of a compressed layer: those allocated now, and those that kept pairs will need."""

from collections.abc import Iterable

import torch
from torch import Tensor

from cachepress.cache.codec import Codec
from cachepress.cache.pairs import PairBytes, Pairs
from cachepress.cache.tail import SLACK
from cachepress.ops import wide_dtype
from cachepress.ops.paged_attention import PAGE

_POSITION = 4


def allocated_bytes(tensors: Iterable[Tensor]) -> int:
    """Add up the bytes of the storages behind some tensors, each counted once."""
    found: dict[tuple[torch.device, int], int] = {}
    for x in tensors:
        storage = x.untyped_storage()
        # An empty one, read from a file, may have the address of another.
        if storage.nbytes():
            found[x.device, storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def bytes_of_pairs(
    pairs: Pairs,
    codec: Codec | None,
    bounded: bool,
    compacts: bool,
    has_state: bool,
    has_bias: bool,
) -> PairBytes:
    """Compute the bytes that the kept pairs of a head need.

    Args:
        pairs: the pairs, of which some are kept.
        codec: how they are stored; None for as they are.
        bounded: whether the keys of each page get bounds.
        compacts: whether keys are rotated to positions of their own.
        has_state: whether a number is kept with each token.
        has_bias: whether the press adds a number to the logits of each pair.
    """
    d, e = pairs.keys.shape[-1], pairs.values.shape[-1]
    key = d * pairs.keys.element_size()
    whole = key + e * pairs.values.element_size() + (2 * key / PAGE if bounded else 0)
    beside = _POSITION * (1 + (compacts or pairs.rope is not None))
    numbers = has_state + (has_bias or pairs.bias is not None)
    beside += numbers * wide_dtype(pairs.keys).itemsize
    each, fixed = whole + beside, 0.0
    if codec is not None:
        # Quantized pairs and the residual end with a page each that is not full.
        fixed = (codec.residual + 2 * PAGE) * each
        each = codec.pair_bytes(pairs.keys, pairs.values) + beside

    def decoded(n: int) -> float:
        """Compute the most bytes that a head needs for ``n`` decoded tokens."""
        if codec is None and not bounded:
            return (n + SLACK) * whole
        residual = SLACK if codec is None else codec.residual
        # The rest of a tail that was put into pages is copied with slack, and grows by it.
        return n * each + (min(n, residual + PAGE) + 2 * SLACK) * whole

    return PairBytes(each, fixed, decoded)
