"""Entry point: parses the command line, runs the command, and ends it with an exit code.

What the user can mend is one line on stderr and code 2; a signal is one line and 128 more than its
number; a reader that is gone is 141, without a word.
"""

import os
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from cachepress import __version__
from cachepress.cli.arguments import FAILED, Command, Parser, add_command
from cachepress.cli.data import ConvertData, ListData, Models, Presses
from cachepress.cli.evaluate import Demo, Evaluate, Score, Sweep
from cachepress.cli.measure import Bench, Train
from cachepress.cli.pages import Inspect, Report
from cachepress.errors import CachepressError, out_of_memory
from cachepress.interrupts import WORDS, Interrupts
from cachepress.limits import is_out_of_memory, visible

CLOSED_PIPE = 128 + signal.SIGPIPE
COMMANDS: dict[str, type[Command]] = {
    "evaluate": Evaluate,
    "sweep": Sweep,
    "report": Report,
    "score": Score,
    "data list": ListData,
    "data convert": ConvertData,
    "inspect": Inspect,
    "demo": Demo,
    "models": Models,
    "bench": Bench,
    "presses": Presses,
    "train": Train,
}
GROUPS = {"data": "list benchmarks, or convert one to a file"}
"""The first words of commands that have two."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments ask for.

    Returns:
        0; 2 after one line on stderr for anything that the user can mend; 130 or 143 after SIGINT
        or SIGTERM, and 141 where nobody reads the output any more.
    """
    command: Command | None = None
    with Interrupts() as interrupts:
        try:
            command = command_of(arguments)
            command.run()
            code = 0
        except BaseException as error:
            code = _ended(error, interrupts, command)
        return code if _flushed() or code else CLOSED_PIPE


def command_of(arguments: Sequence[str] | None) -> Command:
    """Parse arguments to a command."""
    parser = Parser(prog="cachepress", description="KV-cache compression: press, answer, measure.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    actions = {}
    for words, kind in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        if group and group not in actions:
            part = commands.add_parser(group, help=GROUPS[group])
            actions[group] = part.add_subparsers(required=True, metavar="action")
        add_command(actions.get(group, commands), name, kind)
    values = vars(parser.parse_args(arguments))
    return values.pop("command")(values)


def _ended(error: BaseException, interrupts: Interrupts, command: Command | None) -> int:
    """Say in one line why a command ended early.

    Raises:
        BaseException: the error itself, if it is no fault of the user's.
    """
    if interrupts.number is not None or isinstance(error, KeyboardInterrupt):
        number = interrupts.number or signal.SIGINT
        hint = f": {command.KEPT}" if command is not None and command.KEPT else ""
        _fail(f"{WORDS[signal.Signals(number)]}{hint}")
        return 128 + number
    # argparse, whose way out is SystemExit, says nothing of a broken pipe.
    ends_quietly = isinstance(error, BrokenPipeError | SystemExit)
    if ends_quietly and (not _flushed() or _nobody_reads()):
        return CLOSED_PIPE
    message = _explanation(error)
    if message is None:
        raise error
    return _fail(message)


def _explanation(error: BaseException) -> str | None:
    if isinstance(error, CachepressError):
        return str(error)
    if is_out_of_memory(error):
        return str(out_of_memory(error))
    if isinstance(error, RecursionError):
        return "the input is nested too deeply"
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}; nothing that was computed is lost"
    if isinstance(error, ImportError):
        return f'{error}: install it with pip install "cachepress[eval]"'
    return None


def _fail(message: str) -> int:
    with suppress(BrokenPipeError):
        print(f"cachepress: error: {visible(' '.join(message.split()))}", file=sys.stderr)
    return FAILED


def _flushed() -> bool:
    """Flush stdout, and tell whether it was not closed by its reader; discard the rest if so."""
    out = sys.stdout
    if out is None:
        return True
    try:
        out.flush()
    except BrokenPipeError:
        # Python flushes once more when it exits, and would say that it could not.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return False
    return True


def _nobody_reads() -> bool:
    """Tell whether stdout or stderr is a broken pipe; a pipe to a worker can break as well."""
    gone = select.POLLERR | select.POLLHUP
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # It is none of the system's.
            poll.register(stream.fileno(), gone)
    return any(event & gone for _, event in poll.poll(0))
