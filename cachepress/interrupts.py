"""SIGINT and SIGTERM end a command with one line, wherever they hit it, and its workers with it."""

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
    """A signal asked the command to end."""


class Interrupts:
    """While it is entered, both signals raise ``Interrupted`` in the main thread.

    A signal that the process was told to ignore, as under nohup, stays ignored.

    Attributes:
        number: the signal that came last; None if none did. Code that was interrupted may raise
            something else in its place, an import for example.
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
        # It hit a finaliser or a callback, out of which Python lets no exception: once more, then.
        again = threading.Timer(_AGAIN, os.kill, (os.getpid(), self.number))
        again.daemon = True
        again.start()


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: compiled ones abort where an exception hits them."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started here see no SIGINT, not even while Python starts in them.

    A terminal sends it to all of a command's processes, and it is the command that ends the others.
    Signals to this process come after the start: a child that was begun by half is not yet among
    those that are ended, and would say that what it is to do has not reached it.
    """
    with _signals_wait():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Have the signals handled at the end, as far as this process handles any.

    A mask alone does not hold them back: the system gives them to another thread, and Python has
    its handlers run in the main one all the same.
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
    """Begin the work of a child process that ends with its parent, however that one ends.

    Args:
        start: a pickled function, so that whatever it imports is imported under watch.
        shared: its arguments that only a process that is being started can be given.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pickle.loads(start)(*shared)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
