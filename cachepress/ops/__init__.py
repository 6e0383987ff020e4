"""Tensor operations that presses and stores share."""

from cachepress.ops.attention import (
    AttentionRule,
    attention_column_sums,
    attention_weights,
)
from cachepress.ops.device import wait
from cachepress.ops.order import gather, valid_last
from cachepress.ops.precision import wide, wide_dtype
from cachepress.ops.solve import cholesky

__all__ = [
    "AttentionRule",
    "attention_column_sums",
    "attention_weights",
    "cholesky",
    "gather",
    "valid_last",
    "wait",
    "wide",
    "wide_dtype",
]
