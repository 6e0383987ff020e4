"""Tensor operations that presses and stores share."""

from cachepress.ops.attention import AttentionRule, attention_column_peaks, attention_column_sums
from cachepress.ops.order import gather, valid_last

__all__ = [
    "AttentionRule",
    "attention_column_peaks",
    "attention_column_sums",
    "gather",
    "valid_last",
]
