"""Tensor operations that presses and stores share."""

from cachepress.ops.attention import AttentionRule, attention_column_sums

__all__ = ["AttentionRule", "attention_column_sums"]
