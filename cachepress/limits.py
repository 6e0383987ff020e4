"""Limits of what is taken from a user and of what is shown: one place for all of them."""

import re

from cachepress.errors import CachepressError

MOST = 10**7
"""Most that a whole number in an option may be for which something is done or allocated: steps,
workers, channels, tokens of an answer."""
MOST_TOKENS = 2**31 - 1
"""Most that one may be that is only compared with tokens, whose positions are 32-bit numbers, such
as the longest context, a chunk, a window: large values often stand for all tokens."""
MOST_POSITIONS = 10**6
"""Most positions that a score looks at one by one."""
MOST_SEED = 2**32 - 1
MOST_BYTES = 2**60
LONGEST_SPELLING = 10_000
DEEPEST_SPELLING = 40
"""Presses in presses; each costs the interpreter several frames."""
LONGEST_SHOWN = 200

# Control characters but for tab and newline, what turns the direction of a line, halves of pairs.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_NO_MEMORY = re.compile(
    "can't allocate memory|cannot allocate memory|not enough memory|out of memory|ALLOC_FAILED",
    re.IGNORECASE,
)


def is_whole(value: object, least: int, most: int = MOST) -> bool:
    """Whether a value is a whole number within bounds; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def wanted(least: int, most: int = MOST) -> str:
    """What an error says of a whole number that is none, or out of bounds."""
    return f"a whole number of at least {least}, at most {most}"


def check_whole(name: str, value: object, least: int = 1, most: int = MOST) -> None:
    """Raise CachepressError unless an option is a whole number within bounds."""
    if not is_whole(value, least, most):
        raise CachepressError(f"{name}: got {shown(value)}, wanted {wanted(least, most)}")


def shown(value: object, most: int = LONGEST_SHOWN) -> str:
    """A value in an error: its ``repr``, cut to a length that fits into a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError, MemoryError):  # Python writes no number of 5,000 digits.
        text = f"<{type(value).__name__} that is too large to show>"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def said(what: object, most: int | None = None) -> str:
    """What an error or a text says, in one line, and cut to a length if there is one."""
    text = " ".join(str(what).split())
    return text if most is None or len(text) <= most else f"{text[: most - 1]}…"


def visible(text: str) -> str:
    """A text whose control characters are shown, so that a terminal does not obey them."""
    return _UNSEEN.sub(lambda found: repr(found[0])[1:-1], text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, the CPU allocator's or the GPU's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_NO_MEMORY.search(str(error)))
