"""Checks options that are fields of dataclasses, such as those of presses.

What an option means is checked where it belongs; here is only what no option may be.
"""

from dataclasses import fields

from cachepress.errors import CachepressError
from cachepress.limits import MOST_BYTES, MOST_SEED, MOST_TOKENS, check_whole, is_whole, shown


def check_values(options: object) -> None:
    """Raise CachepressError for a flag that is no bool, a name that is no text, a huge integer."""
    for f in fields(options):  # type: ignore
        value = getattr(options, f.name)
        if f.type is bool and not isinstance(value, bool):
            raise CachepressError(f"{f.name}: got {shown(value)}, wanted True or False")
        if f.type == str | None and value is not None and not (isinstance(value, str) and value):
            raise CachepressError(
                f"{f.name}: got {shown(value)}, wanted a file, a folder or a name, as a text"
            )
        if isinstance(value, int) and not is_whole(int(value), -MOST_BYTES, MOST_BYTES):
            raise CachepressError(
                f"{f.name}: got {shown(value)}, wanted a number from {-MOST_BYTES} to {MOST_BYTES}"
            )


def check_count(options: object, name: str, least: int = 1, most: int = MOST_TOKENS) -> None:
    """Raise CachepressError unless the field ``name`` is an integer from ``least`` to ``most``."""
    check_whole(name, getattr(options, name), least, MOST_SEED if name == "seed" else most)
