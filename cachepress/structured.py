"""Reads JSON and YAML that may be damaged or malicious: bounded in size, depth and numbers."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from cachepress.errors import CachepressError
from cachepress.limits import said, shown

LONGEST_JSON, LONGEST_YAML = 2**26, 2**20
MOST_VALUES, DEEPEST = 100_000, 50
_DIGITS = 18
_LOADER: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_WRONG = (
    yaml.YAMLError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What the parsers raise for damaged text."""


def parse_json(text: str) -> object:
    """Parse a JSON text.

    Raises:
        ValueError: if it is not JSON, or exceeds the limits.
    """
    if len(text) > LONGEST_JSON:
        raise ValueError(f"it is longer than {LONGEST_JSON:,} characters")
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(text: str) -> object:
    """Parse a YAML text.

    Raises:
        ValueError: if it is not YAML, or exceeds the limits.
    """
    if len(text) > LONGEST_YAML:
        raise ValueError(f"it is longer than {LONGEST_YAML:,} characters")
    try:
        _check_extent(text)
        value = yaml.load(text, _LOADER)
        _check_numbers(value)
    except _WRONG as error:
        raise ValueError(said(error)) from error
    return value


def read_mapping(path: Path) -> dict[str, object]:
    """Read a file that holds a mapping: JSON if its name ends in .json, else YAML.

    Raises:
        CachepressError: if the file cannot be read, or holds something else.
    """
    parse = parse_json if path.suffix == ".json" else parse_yaml
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CachepressError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        kind = path.suffix[1:].upper()
        raise CachepressError(f"{path} is damaged, or is not {kind}: {said(error, 300)}") from error
    if not isinstance(values, Mapping):
        wanted = "an object" if path.suffix == ".json" else "lines of the form option: value"
        raise CachepressError(f"{path}: got {shown(values)}, wanted {wanted}")
    return {str(name): value for name, value in values.items()}


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a whole number has {len(digits)} digits, wanted at most {_DIGITS}")
    return int(digits)


def _check_extent(text: str) -> None:
    """Count depth and values as if every alias were written out, before any object is built.

    Aliases of aliases let a short text stand for endless values ("billion laughs").
    """
    sizes, names, anchored = [0], [], {}
    for event in yaml.parse(text, _LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchored:
                raise ValueError(f"the alias {shown(event.anchor)} is unknown or holds itself")
            sizes[-1] += anchored[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            sizes[-1] += 1
            anchored[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = sizes.pop(), names.pop()
            sizes[-1] += size
            anchored[anchor] = size
        if sizes[-1] > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values")
        if len(sizes) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")


def _check_numbers(value: object) -> None:
    if isinstance(value, dict):
        for part in (*value.keys(), *value.values()):
            _check_numbers(part)
    elif isinstance(value, list | tuple | set):
        for part in value:
            _check_numbers(part)
    elif isinstance(value, int) and abs(value) >= 10**_DIGITS:
        raise ValueError(f"a whole number has more than {_DIGITS} digits")
