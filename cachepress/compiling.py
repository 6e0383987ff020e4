"""Keeps torch.compile out of what it cannot follow."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., object])


def untraced(function: F) -> F:
    """Mark a function that torch.compile calls as it is, between two graphs, and does not trace."""
    return cast(F, torch.compiler.disable(function))
