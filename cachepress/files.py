"""Files: one path for each of them, and writing that leaves a whole file or none."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def expanded(name: str) -> str:
    """A path whose ``~`` stands for a home folder, as a shell reads it; other names as they are.

    No name of a data set or on the hub begins so, and a shell leaves it where an option is written
    ``--model=~/x``, in YAML and in the spelling of a press.
    """
    return os.path.expanduser(name)  # noqa: PTH111 - Path.expanduser raises for unknown users.


def real_path(name: str) -> str:
    """The one absolute path of a file or folder that several names lead to.

    A text that names no file or folder, such as a repository on the hub, is left as it is.
    """
    given = expanded(name)
    if not given or not os.path.exists(given):  # noqa: PTH110 - nor does this, for any text.
        return name
    path = Path(os.path.realpath(given))
    with suppress(OSError):
        path = _as_listed(path)
    return str(path)


def _as_listed(path: Path) -> Path:
    """The path in the letters of its folders, on disks that take capitals for small letters."""
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
    """A file beside ``path`` to write to, which takes its place when the block ends well.

    Its permissions are those that the umask says, whoever writes it.
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
