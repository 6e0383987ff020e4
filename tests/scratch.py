"""Folders of test runs: gone with their process, and where that was killed, with the next run."""

import atexit
import os
import re
import shutil
from pathlib import Path
from tempfile import gettempdir, mkdtemp

_PREFIX = "cachepress-tests-"


def scratch() -> Path:
    """An empty folder for as long as this process lives."""
    for left in Path(gettempdir()).glob(f"{_PREFIX}*"):
        owner = re.match(rf"{_PREFIX}(\d+)-", left.name)
        if owner and _is_over(int(owner[1])):
            shutil.rmtree(left, ignore_errors=True)
    folder = mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _is_over(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # It belongs to another user.
        return False
    return False
