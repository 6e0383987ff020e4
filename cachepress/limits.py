"""Limits on option values and on the length of error messages."""

import re

from cachepress.errors import CachepressError

MOST = 10**7
"""The largest whole number of an option that says how much is done or allocated: steps, workers,
channels, tokens of an answer."""
MOST_TOKENS = 2**31 - 1
"""The largest whole number of an option that is only compared with numbers of tokens, such as a
window, a chunk or the longest context: large values often stand for all tokens, whose positions are
32-bit integers."""
MOST_POSITIONS = 10**6
"""The most positions that a score is computed at one by one."""
MOST_SEED = 2**32 - 1
MOST_BYTES = 2**60
LONGEST_SPELLING = 10_000
DEEPEST_SPELLING = 40
"""Presses nested in presses; each level costs the interpreter several frames."""
LONGEST_SHOWN = 200

# Control characters but for tab and newline, marks of writing direction, halves of surrogate pairs.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_NO_MEMORY = re.compile(
    "can't allocate memory|cannot allocate memory|not enough memory|out of memory|ALLOC_FAILED",
    re.IGNORECASE,
)


def is_whole(value: object, least: int, most: int = MOST) -> bool:
    """Tell whether a value is an integer within bounds; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def wanted(least: int, most: int = MOST) -> str:
    """Say which whole numbers an option takes, for an error message."""
    return f"a whole number of at least {least}, at most {most}"


def check_whole(name: str, value: object, least: int = 1, most: int = MOST) -> None:
    """Raise CachepressError unless an option is a whole number within bounds."""
    if not is_whole(value, least, most):
        raise CachepressError(f"{name}: got {shown(value)}, wanted {wanted(least, most)}")


def shown(value: object, most: int = LONGEST_SHOWN) -> str:
    """Show a value in an error message: its ``repr``, cut to a length that fits into a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError, MemoryError):  # Python writes no number of 5,000 digits.
        text = f"<{type(value).__name__} that is too large to show>"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def described(value: object) -> str:
    """Show a wrong argument in an error message, a class by its name."""
    return f"the class {value.__name__}" if isinstance(value, type) else shown(value)


def said(what: object, most: int | None = None) -> str:
    """Put an error's message or a text into one line, and cut it to a length if there is one."""
    text = " ".join(str(what).split())
    return text if most is None or len(text) <= most else f"{text[: most - 1]}…"


def visible(text: str) -> str:
    """Escape the control characters of a text, so that a terminal does not obey them."""
    return _UNSEEN.sub(lambda found: repr(found[0])[1:-1], text)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out: Python's, the CPU's or the GPU's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_NO_MEMORY.search(str(error)))
