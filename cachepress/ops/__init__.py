"""Tensor operations that presses and stores share."""

from cachepress.ops.attention import (
    AttentionRule,
    attention_column_peaks,
    attention_column_sums,
    attention_weights,
)
from cachepress.ops.blockwise import blocks, by_token, norms
from cachepress.ops.device import Ahead, known_counts, on_device, wait
from cachepress.ops.gradients import backward_task, following, storing, without_gradient
from cachepress.ops.moments import RunningMoments, quadratic_forms
from cachepress.ops.order import entries_of, gather, valid_last
from cachepress.ops.precision import narrowest, wide, wide_dtype, without_autocast
from cachepress.ops.similarity import finite_directions, most_similar, newest_similar
from cachepress.ops.solve import cholesky

__all__ = [
    "Ahead",
    "AttentionRule",
    "RunningMoments",
    "attention_column_peaks",
    "attention_column_sums",
    "attention_weights",
    "backward_task",
    "blocks",
    "by_token",
    "cholesky",
    "entries_of",
    "finite_directions",
    "following",
    "gather",
    "known_counts",
    "most_similar",
    "narrowest",
    "newest_similar",
    "norms",
    "on_device",
    "quadratic_forms",
    "storing",
    "valid_last",
    "wait",
    "wide",
    "wide_dtype",
    "without_autocast",
    "without_gradient",
]
