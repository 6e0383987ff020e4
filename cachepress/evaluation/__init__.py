"""Evaluates presses on data sets: quality, cache bytes and seconds, written to files."""

from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.registry import DATASET_REGISTRY, METRIC_REGISTRY, PRESS_REGISTRY
from cachepress.evaluation.runner import EvaluationRunner

__all__ = [
    "DATASET_REGISTRY",
    "METRIC_REGISTRY",
    "PRESS_REGISTRY",
    "EvaluationConfig",
    "EvaluationRunner",
]
