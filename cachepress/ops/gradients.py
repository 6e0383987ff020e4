"""Gradients of what a cache holds: right, or refused with one line in ``backward()``."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from cachepress.errors import CachepressError

P = ParamSpec("P")
T = TypeVar("T")


def following(*tensors: Tensor) -> AbstractContextManager[object]:
    """Record what is done to tensors of an autograd graph, in whatever grad mode.

    Scores are computed and caches are forked without gradients, but what is only moved by that
    stays a part of the graph that it came from.
    """
    if any(x.requires_grad for x in tensors):
        return torch.enable_grad()
    return nullcontext()


def storing(method: Callable[P, T]) -> Callable[P, T]:
    """Decorate what makes tensors that outlive a forward: inference mode does not apply to them.

    Tensors that are made in inference mode cannot be used in a forward that records gradients.
    """

    @wraps(method)
    def stored(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return stored


def backward_task() -> int | None:
    """Return which ``backward()`` this thread is in; None for none."""
    task = torch._C._current_graph_task_id()
    return None if task < 0 else task


def without_gradient(x: Tensor, why: str) -> Tensor:
    """Return numbers whose gradient is lost: ``backward()`` through them raises CachepressError."""
    with torch.enable_grad():
        return _Lost.apply(x.detach(), why, torch.empty(0, requires_grad=True))  # pyright: ignore[reportReturnType]


class _Lost(torch.autograd.Function):
    """Passes numbers on, and raises an error where their gradient is asked for."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, why: str, leaf: Tensor) -> Tensor:
        """Return ``x``; the leaf makes it a part of a graph, and holds nothing else in memory."""
        ctx.why = why  # pyright: ignore[reportAttributeAccessIssue]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> None:
        """Raise CachepressError."""
        raise CachepressError(ctx.why)  # pyright: ignore[reportAttributeAccessIssue]
