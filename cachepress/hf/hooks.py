"""Module hooks that act in one thread or task, and copies of modules that have none.

Hooks of torch are called in every thread that runs the module. Two requests on one model would
hear each other, and torch numbers hooks without a lock: two that are registered at one moment may
get one number, and the second takes the place of the first.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from threading import Lock
from types import MappingProxyType, TracebackType
from typing import Self, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

M = TypeVar("M", bound=nn.Module)
_OPEN: ContextVar[tuple["Hooks", ...]] = ContextVar("cachepress_hooks", default=())
_LOCK = Lock()
_NOTHING: Mapping[str, object] = MappingProxyType({})


class Hooks:
    """The context manager of hooks that act in the thread or task that entered it, until its end.

    Hooks are registered inside of the block.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        _OPEN.set((*_OPEN.get(), self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _OPEN.set(tuple(other for other in _OPEN.get() if other is not self))
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def before(self, module: nn.Module, hook: Callable[..., object]) -> None:
        """Call ``hook(module, args, kwargs)`` before each forward of a module."""
        with _LOCK:
            call = partial(self._before, hook)
            self._handles.append(module.register_forward_pre_hook(call, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., object]) -> None:
        """Call ``hook(module, args, output)`` after each forward of a module."""
        with _LOCK:
            self._handles.append(module.register_forward_hook(partial(self._after, hook)))

    @property
    def _acts(self) -> bool:
        return any(hooks is self for hooks in _OPEN.get())

    def _before(
        self,
        hook: Callable[..., object],
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: Mapping[str, object] = _NOTHING,
    ) -> object:
        # Torch gives no kwargs where a hook is removed in the moment that another thread calls it.
        return hook(module, args, kwargs) if self._acts else None

    def _after(
        self,
        hook: Callable[..., object],
        module: nn.Module,
        args: tuple[object, ...],
        output: object,
    ) -> object:
        return hook(module, args, output) if self._acts else None


def unhooked(module: M) -> M:
    """Copy a module, not its parts, with the same weights but without hooks."""
    copied = copy.copy(module)
    hooks = {name: OrderedDict() for name in vars(module) if name.endswith("_hooks")}
    vars(copied).update(hooks)
    return copied
