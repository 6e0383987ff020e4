"""Reads dataclasses from files, each field checked against its type, and converts them to JSON."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, TypeVar, get_args, get_origin, get_type_hints

from cachepress.errors import CachepressError
from cachepress.limits import said, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
NULL = "null"
"""In the metadata of a field: what null stands for, as JSON knows no infinity."""
_SHOWN = 160
"""Characters of what is wrong in an error."""
_KINDS: dict[object, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    list: ((list,), "a list of names"),
}


class Mistyped(ValueError):
    """Field of a file that has the wrong type.

    Args:
        name: the field.
        got: what stands there, in words.
        wanted: what should.
    """

    def __init__(self, name: str, got: str, wanted: str) -> None:
        super().__init__(f"{name}: got {got}, wanted {wanted}")
        self.name, self.got, self.wanted = name, got, wanted


def read_as(kind: type[T], values: Mapping[str, object]) -> T:
    """Make a dataclass of the values of a file, each checked; other names are ignored.

    Fields may lack that have a default or can be None.

    Raises:
        Mistyped: if a field lacks, or is not of its type.
    """
    hints, found = get_type_hints(kind), {}
    for f in fields(kind):
        value = values.get(f.name)
        if value is None and NULL in f.metadata:
            found[f.name] = f.metadata[NULL]
        elif f.name in values or (f.default, f.default_factory) == (MISSING, MISSING):
            got = shown(value) if f.name in values else "nothing"
            found[f.name] = _value(hints[f.name], value, f.name, got)
    return kind(**found)


def read_fields(kind: type[T], path: Path, values: Mapping[str, object]) -> T:
    """Do what ``read_as`` does, with errors that name the file.

    Raises:
        CachepressError: if a field lacks, or is not of its type, naming the file.
    """
    try:
        return read_as(kind, values)
    except Mistyped as error:
        got = said(error.got, _SHOWN)
        text = f"{path}: {error.name} is {got}, wanted {error.wanted}; run evaluate again"
        raise CachepressError(text) from error


def _value(kind: object, value: object, name: str, got: str) -> object:
    """Check a value against a type hint, and return it, converted."""
    one = get_args(kind)[0] if isinstance(kind, UnionType) else kind
    if value is None and one is not kind:
        return None
    outer = get_origin(one) or one
    if outer is object:
        return value
    if outer is Mapping and isinstance(value, Mapping):
        part = get_args(one)[1]
        return {str(key): _value(part, x, str(key), shown(x)) for key, x in value.items()}
    if isinstance(outer, type) and is_dataclass(outer) and isinstance(value, Mapping):
        return read_as(outer, value)
    accepted, wanted = _KINDS.get(outer, ((), "a mapping"))
    if not isinstance(value, accepted) or isinstance(value, bool) != (outer is bool):
        raise Mistyped(name, got, wanted)
    if isinstance(value, list):
        return [_value(get_args(one)[0], x, name, shown(x)) for x in value]
    return float(value) if outer is float and isinstance(value, int) else value


def plain(value: object) -> object:
    """Convert a value for JSON: dataclasses to mappings, numbers that are not finite to null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value
