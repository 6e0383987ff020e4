"""Tensor operations that presses and stores share."""

from cachepress.ops.attention import AttentionRule, attention_column_sums, attention_weights

__all__ = ["AttentionRule", "attention_column_sums", "attention_weights"]
