"""What a run has done so far, on disk: one line a sample, and files that are whole or absent."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from cachepress.errors import CachepressError
from cachepress.files import replacing
from cachepress.limits import shown
from cachepress.structured import parse_json


class Records:
    """An append-only file with one JSON line for every answered sample.

    A line that was only half written, by a crash or a full disk, is cut off when the file is
    opened; every line before it stands.

    Args:
        path: the file.
        check: raises a ValueError for a record that is none of ours.

    Attributes:
        done: the records by key.
    """

    def __init__(self, path: Path, check: Callable[[dict], None] = lambda record: None) -> None:
        self._path, self._check = path, check
        self.done: dict[str, dict] = {}
        if path.exists():
            self._read()

    def append(self, records: Mapping[str, dict]) -> None:
        """Write records by their keys; they are on disk when this returns."""
        lines = [
            json.dumps({"key": key, **record}, ensure_ascii=False)
            for key, record in records.items()
        ]
        start = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("ab") as file:
                # In JSON, half of a surrogate pair can only stand as an escape.
                file.write("".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if self._path.exists():
                os.truncate(self._path, start)
            raise
        self.done |= records

    def _read(self) -> None:
        raw = self._path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(self._path, len(whole))
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                key, record = _parsed(line.decode())
                self._check(record)
                self.done[key] = record
            except ValueError as error:
                raise CachepressError(
                    f"{self._path} line {number} is damaged: {error}; remove that line and run "
                    "again, or start over with --overwrite"
                ) from error


def _parsed(line: str) -> tuple[str, dict]:
    record = parse_json(line)
    if not isinstance(record, dict) or not isinstance(record.get("key"), str):
        raise ValueError(f"got {shown(record)}, wanted a mapping with a key")
    return record.pop("key"), record


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is the old one or the new one, never a part."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
