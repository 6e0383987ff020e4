"""What holds for the whole process: how tokens are decoded from compressed caches on a GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_RECORDED = os.environ.get("CACHEPRESS_RECORDED", "1") != "0"
_COMPILED = os.environ.get("CACHEPRESS_COMPILED", "0") == "1"
_COMPILED_HERE: ContextVar[bool | None] = ContextVar("compiled", default=None)


def configure(*, recorded: bool | None = None, compile: bool | None = None) -> None:
    """Choose for the whole process how tokens are decoded from compressed caches on a GPU.

    Args:
        recorded: record a step once as a CUDA graph and replay it for the tokens that follow;
            False runs every step as transformers does. True unless the environment variable
            ``CACHEPRESS_RECORDED`` is 0 when the process starts. None changes nothing.
        compile: let torch.compile (its inductor) compile the model before a step is recorded,
            which takes up to some minutes for a large one, once for each form of a cache; each
            token takes less time then. False unless ``CACHEPRESS_COMPILED`` is 1. None changes
            nothing.
    """
    global _RECORDED, _COMPILED
    _RECORDED = _RECORDED if recorded is None else recorded
    _COMPILED = _COMPILED if compile is None else compile


def is_recorded() -> bool:
    """Tell whether decoded steps are recorded."""
    return _RECORDED


def is_compiled() -> bool:
    """Tell whether steps are compiled before they are recorded, in this thread or task."""
    here = _COMPILED_HERE.get()
    return _COMPILED if here is None else here


@contextmanager
def compiled_here(compiled: bool | None) -> Iterator[None]:
    """Choose within the block whether steps are compiled; None leaves it as it is."""
    token = _COMPILED_HERE.set(_COMPILED_HERE.get() if compiled is None else compiled)
    try:
        yield
    finally:
        _COMPILED_HERE.reset(token)
