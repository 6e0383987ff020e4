"""Tells which ``with press(model)`` acts on a forward.

A block acts in the thread or task that entered it, and in whatever copies its context. A thread
without a block of its own takes the one that the main thread holds open, so that a ``generate()``
that streams from a helper thread, or requests in threads under one ``with``, are compressed. A
block of any other thread never reaches it.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import nn

from cachepress.hf.around import Call

logger = logging.getLogger(__name__)


class Session(Protocol):
    """Acts on the forwards of a model inside a block."""

    def forward(self, call: Call) -> object:
        """Run a forward of the model, and compress its cache."""
        ...


class Block:
    """One entry into a ``with press(model)``.

    Attributes:
        decoder: the decoder whose forwards it acts on.
        session: what acts; None after the exit.
        around: the blocks of the same context that were open when it was entered.
        main: whether the main thread entered it.
        told: whether it was said that another thread's forward was not compressed by it.
    """

    def __init__(self, decoder: nn.Module, session: Session) -> None:
        self.decoder = decoder
        self.session: Session | None = session
        self.around = tuple(block for block in _OWN.get() if block.session is not None)
        self.main = threading.current_thread() is threading.main_thread()
        self.told = False


_OWN: ContextVar[tuple[Block, ...]] = ContextVar("cachepress_blocks", default=())
"""The blocks that were entered in this context, the innermost last."""
_OPEN: list[Block] = []
"""All open blocks, of every thread: which of them a thread without one may take."""
_LOCK = threading.Lock()
_UNOBSERVED: ContextVar[tuple[nn.Module, ...]] = ContextVar("cachepress_unobserved", default=())


def enter(block: Block) -> None:
    """Open a block in this context."""
    _OWN.set((*block.around, block))
    with _LOCK:
        _OPEN.append(block)


def leave(block: Block) -> None:
    """Close a block, in whatever context and order; others stay as they are.

    It may be called again, as after an interrupt.
    """
    block.session = None
    with _LOCK:
        if block in _OPEN:
            _OPEN.remove(block)
    _OWN.set(tuple(other for other in _OWN.get() if other.session is not None))


def is_own(block: Block) -> bool:
    """Tell whether a block was entered in this context."""
    return block in _OWN.get()


def acting(decoder: nn.Module) -> Session | None:
    """Find the session that acts on a forward of a decoder, here and now; None for none."""
    if any(module is decoder for module in _UNOBSERVED.get()):
        return None
    for block in reversed(_OWN.get()):
        session = block.session
        if block.decoder is decoder and session is not None:
            return session
    block = _of_main_thread(_open(decoder))
    return None if block is None else block.session


def tell(decoder: nn.Module) -> None:
    """Log, once for each open block, that none acts on a forward of this thread or task."""
    untold = [block for block in _open(decoder) if not block.told]
    for block in untold:
        block.told = True
    if untold and not any(module is decoder for module in _UNOBSERVED.get()):
        logger.warning(
            "a forward in a thread or task without `with press(model)` is not compressed, while "
            "another one holds such a block open: if it should be, start it with "
            "contextvars.copy_context().run, or enter a block in it"
        )


def _open(decoder: nn.Module) -> list[Block]:
    with _LOCK:
        return [block for block in _OPEN if block.decoder is decoder]


def _of_main_thread(blocks: list[Block]) -> Block | None:
    """Find the block that the main thread holds open, for a thread that has none.

    Tasks of the main thread may hold several open that know nothing of each other: then nobody can
    tell which of them is meant.
    """
    mine = [block for block in blocks if block.main]
    if not mine or threading.current_thread() is threading.main_thread():
        return None
    innermost = max(mine, key=lambda block: len(block.around))
    nested = all(block is innermost or block in innermost.around for block in mine)
    return innermost if nested else None


@contextmanager
def unobserved(decoder: nn.Module) -> Iterator[None]:
    """Let no block act on forwards of a decoder, in this context."""
    token = _UNOBSERVED.set((*_UNOBSERVED.get(), decoder))
    try:
        yield
    finally:
        _UNOBSERVED.reset(token)
