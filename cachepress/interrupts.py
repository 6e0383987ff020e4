"""Ends a command and its worker processes with one line when SIGINT or SIGTERM arrives."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType
from typing import Self

NUMBERS = (signal.SIGINT, signal.SIGTERM)
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_AGAIN = 0.1


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM asked the command to end."""


class Interrupts:
    """Raises ``Interrupted`` in the main thread at SIGINT and SIGTERM, while it is entered.

    A signal that the process was told to ignore, as under nohup, stays ignored.

    Attributes:
        number: the signal that came last; None if none did. It is held here because code that is
            interrupted, such as an import, may raise another error in place of ``Interrupted``.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._raise)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *error: object) -> None:
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if _importing(frame):
            os.write(2, f"cachepress: error: {WORDS[signal.Signals(number)]}\n".encode())
            os._exit(128 + number)
        raise Interrupted

    def _unraisable(self, found: "sys.UnraisableHookArgs") -> None:
        if not isinstance(found.exc_value, Interrupted):
            self._hook(found)
            return
        # Python discards exceptions of finalisers and callbacks: send the signal again.
        again = threading.Timer(_AGAIN, os.kill, (os.getpid(), self.number))
        again.daemon = True
        again.start()


def _importing(frame: FrameType | None) -> bool:
    """Tell whether a module is being imported: compiled ones abort at an exception."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def children_ignore_sigint() -> Iterator[None]:
    """Start processes that ignore SIGINT, from the very first moment.

    A terminal sends SIGINT to all processes of a command; the command itself ends its workers.
    Signals to this process are handled after the start: a child that is started by half is not yet
    among those that are ended, and would complain that it was not told what to do.
    """
    with _signals_wait():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Delay the signals that this process handles until the end.

    A signal mask is not enough: the system delivers them to another thread, and Python runs its
    handlers in the main thread all the same.
    """
    came: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], object]] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if callable(handler := signal.getsignal(number)):
                    before[number] = handler
                    signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def start_worker(start: bytes, *shared: object) -> None:
    """Run a function in a child process that ends when its parent does, however that ends.

    Args:
        start: a pickled function, so that its imports happen after the parent is observed.
        shared: its arguments that cannot be pickled and are inherited when a process starts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pickle.loads(start)(*shared)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
