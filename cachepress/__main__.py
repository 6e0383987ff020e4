"""Runs the command line: ``python -m cachepress`` is ``cachepress``."""

import signal
import sys
from io import TextIOWrapper
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line as a process of its own."""
    # Before and after the command, whose main says it in words, an interrupt ends the process
    # as it ends others: with no traceback of what happened to be imported or cleaned up.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A name may hold what the terminal cannot show.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    from cachepress.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
