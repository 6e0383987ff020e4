"""Evaluation: a press on a data set, with quality, bytes and seconds in files."""

from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.registry import DATASET_REGISTRY, PRESS_REGISTRY, SCORER_REGISTRY
from cachepress.evaluation.runner import EvaluationRunner

__all__ = [
    "DATASET_REGISTRY",
    "PRESS_REGISTRY",
    "SCORER_REGISTRY",
    "EvaluationConfig",
    "EvaluationRunner",
]
