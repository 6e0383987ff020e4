"""Records answers on disk, one JSON line for each sample, and writes files atomically.

Scores are not here: they are computed from the answers, see ``cachepress.evaluation.results``.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cachepress.errors import CachepressError
from cachepress.evaluation.typed import read_as
from cachepress.files import replacing
from cachepress.limits import shown
from cachepress.structured import parse_json

RECORDS = "records.jsonl"
SCHEMA = 1
"""What the fields of records, metrics and saved options mean; version 0.1.0 gave no number."""
_ANY, _MOST = ("kl", "nll"), 1e18
"""Numbers that rounding can bring below 0, and a model to infinity; and the most of all others."""


@dataclass(frozen=True)
class Answer:
    """Answer to one sample, with its bytes and seconds.

    Attributes:
        predicted_answer: the text.
        decode_tokens: its tokens.
        context_tokens: tokens of the context, the chat template's part included.
        prompts: name and hash of the user's prompts; None for those here.
        cut_tokens: tokens of it that were cut; None in a record that does not say it.
        prefill_seconds: time of reading the context, compression included.
        press_seconds: time of it that the press added; None where it was not measured.
        step_seconds: median time of decoding one token of one sequence after the context; None
            where it was not measured.
        bytes_before: bytes that an uncompressed cache of the context holds.
        bytes_after: bytes that the compressed one has allocated.
        rows_seen: key-value pairs that an uncompressed cache holds, of all heads and layers.
        rows_held: key-value pairs that are kept.
        peak_memory_bytes: the most memory that the process had needed by then; None where others
            shared its reading.
        machine: what it ran on.
        kl: KL divergence in nats a token of what the model expects at each token of the
            uncompressed model's answer, from what the uncompressed model expects; None where it was
            not asked for.
        nll: negative log-likelihood in nats a token of the first accepted text; None where the
            metric does not ask for it.
        step_seconds_low: first quartile of the times whose median is ``step_seconds``; None in old
            records.
        step_seconds_high: their third quartile.
    """

    predicted_answer: str
    decode_tokens: int
    context_tokens: int
    prefill_seconds: float
    press_seconds: float | None
    step_seconds: float | None
    bytes_before: int
    bytes_after: int
    rows_seen: int
    rows_held: int
    peak_memory_bytes: int | None
    machine: str
    kl: float | None = None
    nll: float | None = None
    cut_tokens: int | None = None
    prompts: str | None = None
    step_seconds_low: float | None = None
    step_seconds_high: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and name not in _ANY and not 0 <= value < _MOST:
                raise ValueError(f"{name}: got {shown(value)}, wanted 0 or more")


@dataclass(frozen=True, kw_only=True)
class Record(Answer):
    """Answer as it is recorded on disk, with its sample, digests and library versions.

    Attributes:
        sample_id: which sample it answers.
        context_id: number of the sample's context.
        digests: of the model and of what the press has learned, by part.
        versions: of the libraries that computed it; None in records of 0.1.0.
    """

    sample_id: int
    context_id: int
    digests: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, object]:
        """Return the fields as the file has them."""
        return {"schema": SCHEMA, "sample_id": None, "context_id": None, **asdict(self)}


class Records:
    """An append-only file with one JSON line for every answered sample.

    A line that was only half written, by a crash or a full disk, is cut off when the file is
    opened; every line before it stands.

    Args:
        path: the file.

    Attributes:
        done: the records by key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[str, Record] = {}
        if path.exists():
            self._read()

    def append(self, records: Mapping[str, Record]) -> None:
        """Append records by their keys; they are on disk when this returns."""
        lines = [
            json.dumps({"key": key, **record.to_json()}, ensure_ascii=False)
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
                self.done[key] = record
            except ValueError as error:
                raise CachepressError(
                    f"{self._path} line {number} is damaged: {error}; remove that line and run "
                    "again, or start over with --overwrite"
                ) from error


def _parsed(line: str) -> tuple[str, Record]:
    values = parse_json(line)
    if not isinstance(values, dict) or not isinstance(key := values.get("key"), str):
        raise ValueError(f"got {shown(values)}, wanted a mapping with a key")
    check_schema(values)
    return key, read_as(Record, values)


def check_schema(values: Mapping[str, object]) -> None:
    """Raise ValueError if a later version wrote these values, with fields of other meanings."""
    schema = values.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise ValueError(f"schema: got {shown(schema)}, wanted {SCHEMA}, which this version knows")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically: after a crash it is the old or the new one, never a part."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
