"""Files: one path for each of them, and writing that ends with a whole file or none."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cachepress.errors import CachepressError


def expanded(name: str) -> str:
    """Expand the ``~`` of a path to a home folder, as a shell does; return other names unchanged.

    A shell does not expand it in ``--model=~/x``, in YAML, or in the spelling of a press. No name
    on the hub or of a data set begins with it.
    """
    return os.path.expanduser(name)  # noqa: PTH111 - Path.expanduser raises for unknown users.


def read_text(path: str) -> str:
    """Read a text file in UTF-8.

    Raises:
        CachepressError: if it cannot be read, or is not in UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CachepressError(f"{path} is not a text in UTF-8: {error}") from error
    except OSError as error:
        raise CachepressError(f"cannot read {path}: {error.strerror or error}") from error


def real_path(name: str) -> str:
    """Return the one absolute path of a file or folder that may have several names.

    A text that names no file or folder, such as a repository on the hub, is returned unchanged.
    """
    given = expanded(name)
    if not given or not os.path.exists(given):  # noqa: PTH110 - nor does this, for any text.
        return name
    path = Path(os.path.realpath(given))
    with suppress(OSError):
        path = _as_listed(path)
    return str(path)


def _as_listed(path: Path) -> Path:
    """Spell a path as its folders list it, on disks that ignore upper and lower case."""
    other = Path(str(path).swapcase())
    if other == path or not (other.exists() and other.samefile(path)):
        return path
    found = Path(path.anchor)
    for part in path.parts[1:]:
        names = [] if (found / part) in found.iterdir() else found.iterdir()
        alike = (name for name in names if name.name.casefold() == part.casefold())
        found = next(alike, found / part)
    return found


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside ``path`` to write to, and move it there if no error is raised.

    It has the permissions that the umask gives new files, whatever library writes it.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    partial.touch(exist_ok=False)
    try:
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
