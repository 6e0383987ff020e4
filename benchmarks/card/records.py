"""The JSON of a run: what it ran on, and the cells of every section."""

import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from cachepress.files import replacing
from cachepress.limits import is_out_of_memory

LINE = "line"
"""The key of a cell that has no figures, and says in a line why."""
NO_TIME = "no time was left"
LONGEST_LINE = 300
Values = dict[str, object]


@dataclass
class Section:
    """The cells of a section, in the order in which they were measured.

    Attributes:
        state: "not reached", "running", "done", or "cut" where its time was up or it was killed.
        seconds: how long it took.
        cells: figures by name, or a line.
    """

    state: str = "not reached"
    seconds: float = 0.0
    cells: dict[str, Values] = field(default_factory=dict)


@dataclass
class Record:
    """A run.

    Attributes:
        date: the day.
        command: what was typed.
        minutes: what it might take.
        seconds: what it took.
        machine: the card, and the versions of the libraries.
        sizes: lengths and batch sizes that stand in the cells, by what they are for.
        running: section and cell that are being measured.
        sections: by name.
    """

    date: str = ""
    command: str = ""
    minutes: float = 0.0
    seconds: float = 0.0
    machine: Values = field(default_factory=dict)
    sizes: Values = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    sections: dict[str, Section] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file."""
        data = json.loads(path.read_text(encoding="utf-8"))
        data["sections"] = {name: Section(**own) for name, own in data["sections"].items()}
        return cls(**data)

    @classmethod
    def read_if_any(cls, path: Path) -> Self | None:
        """Read a file; None where there is none that can be read."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            return cls.read(path)
        return None

    def write(self, path: Path) -> None:
        """Write the file anew, whole or not at all."""
        with replacing(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def section(self, name: str) -> Section:
        """Return a section, made where there is none."""
        return self.sections.setdefault(name, Section())

    def cells(self, section: str) -> Mapping[str, Values]:
        """Return the cells of a section."""
        return self.sections[section].cells if section in self.sections else {}

    def measured(self, section: str, **wanted: object) -> Iterator[Values]:
        """Yield the cells of a section that have figures and these values."""
        for values in self.cells(section).values():
            if LINE not in values and wanted.items() <= values.items():
                yield values

    def one(self, section: str, key: str, **wanted: object) -> float | None:
        """Return a figure of the first cell with these values; None where there is none."""
        for values in self.measured(section, **wanted):
            found = values.get(key)
            if isinstance(found, int | float):
                return float(found)
        return None


def guarded(work: Callable[[], Values]) -> Values:
    """Do work; what it raises becomes a line."""
    try:
        return work()
    except Exception as error:
        return {LINE: line_of(error)}


def line_of(error: BaseException) -> str:
    """Write an error on one line, with the place in this project that it comes from."""
    said = " ".join(str(error).split())[:LONGEST_LINE]
    if is_out_of_memory(error) or said.startswith("out of memory"):
        return said if said.startswith("does not fit") else f"does not fit: {said}"
    places = [
        f"{Path(frame.filename).name}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if "cachepress/" in frame.filename and "site-packages" not in frame.filename
    ]
    return f"{type(error).__name__}: {said}" + (f" ({places[-1]})" if places else "")


def told(values: Values) -> str:
    """Write a cell on one line."""
    if LINE in values:
        return str(values[LINE])
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
