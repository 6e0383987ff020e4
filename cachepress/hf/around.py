"""Puts a function around a method of a module, and takes it away when nobody wants it any more."""

import copy
import inspect
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache, update_wrapper
from threading import Lock
from typing import NamedTuple

import torch
from torch import nn

from cachepress.compiling import untraced

Method = Callable[..., object]


class Call(NamedTuple):
    """A call of a method of a module, which has not run yet.

    Attributes:
        module: the module.
        method: its own method.
        args: the arguments.
        kwargs: those that are given by name.
    """

    module: nn.Module
    method: Method
    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    def run(self) -> object:
        """Call the method."""
        return self.method(*self.args, **self.kwargs)

    def named(self) -> dict[str, object]:
        """Name all arguments of a module's forward."""
        names = _parameters(type(self.module))
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


Act = Callable[[Call], object]
"""Decides what becomes of a call."""

_LOCK = Lock()


class Around:
    """Stands in a module for one of its methods, and lets a function decide about each call.

    It has the name, documentation and signature of the method. A copy of the module, or a pickled
    one, gets the method itself and knows nothing of this.

    Args:
        module: the module.
        own: its method.
        act: the function.
        traced: whether torch.compile traces the method as if this were not here.
    """

    def __init__(self, module: nn.Module, own: Method, act: Act, traced: bool) -> None:
        update_wrapper(self, own)
        self.module, self.own, self.act = weakref.ref(module), own, act
        self.traced = traced
        self.users: set[int] = set()

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Let the function decide about a call."""
        if self.traced and torch.compiler.is_dynamo_compiling():
            return self.own(*args, **kwargs)
        return _decide(self, args, kwargs)

    def __reduce__(self) -> tuple[Callable[[Method], Method], tuple[Method]]:
        """Leave only the method, which a copied or unpickled module binds to itself."""
        return copy.copy, (self.own,)


@untraced
def _decide(around: Around, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    module = around.module()
    if module is None:
        return around.own(*args, **kwargs)
    return around.act(Call(module, around.own, args, kwargs))


@lru_cache
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """List the names of the arguments of a forward, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def put_around(
    module: nn.Module, name: str, act: Act, user: object, traced: bool = False
) -> Around:
    """Put a function around a method of a module, unless it is there already, for a user."""
    with _LOCK:
        around = module.__dict__.get(name)
        if not isinstance(around, Around) or around.act is not act:
            around = Around(module, getattr(module, name), act, traced)
            module.__dict__[name] = around
        around.users.add(id(user))
        return around


def take_away(module: nn.Module, name: str, around: Around, user: object) -> None:
    """Remove a function for one user; after the last user the module has its method back.

    Where somebody else has put a function around the method since, ours stays, and lets calls pass.
    """
    with _LOCK:
        around.users.discard(id(user))
        # Below it may be one that nobody wants either, but that could not be taken away then.
        unwanted: Method = around
        while isinstance(unwanted, Around) and not unwanted.users:
            if module.__dict__.get(name) is not unwanted:
                return
            own = unwanted.own
            bound = getattr(own, "__func__", None)
            if bound is not None and bound is getattr(type(module), name, None):
                del module.__dict__[name]
                return
            module.__dict__[name] = unwanted = own
