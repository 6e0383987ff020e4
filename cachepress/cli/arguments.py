"""Makes argparse options of dataclass fields: name, type, default, and help of the docstring.

A command is a dataclass whose fields are its options and whose ``run`` does it. The first line of
its docstring is listed by ``cachepress --help``; all of it, and what it says of each field, is
shown by ``cachepress COMMAND --help``.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from inspect import cleandoc
from types import NoneType, UnionType
from typing import (
    Annotated,
    ClassVar,
    Literal,
    NoReturn,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from cachepress.files import expanded
from cachepress.limits import is_whole, shown, visible, wanted
from cachepress.options import Place, Whole

FAILED = 2
POSITIONAL = {"positional": True}
"""Metadata of a field that is named by its place."""
SWITCH = {"switch": True}
"""Metadata of a flag that is off unless it is given."""
_REST = "rest"
_Action = str | type[argparse.Action]


@dataclass(frozen=True)
class Command:
    """Base class of a command, whose fields are its command-line options."""

    KEPT: ClassVar[str] = ""
    """What is left where it is interrupted; nothing is said of one that is over in a moment."""

    def run(self) -> None:
        """Run the command."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rest:
    """Options of other dataclasses that a command takes besides its own.

    Attributes:
        kinds: the dataclasses; of fields of one name, the first one's is taken.
        without: names of fields that are no options.
        aliases: other flags of some of them, by name.
    """

    kinds: Sequence[type]
    without: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, tuple[type, Field[object]]]:
        """The fields that are options, each with its dataclass, by name."""
        found: dict[str, tuple[type, Field[object]]] = {}
        for kind in self.kinds:
            for f in fields(kind):
                found.setdefault(f.name, (kind, f))
        return {name: option for name, option in found.items() if name not in self.without}


def given(*kinds: type, without: Sequence[str] = (), **aliases: str) -> dict[str, Rest]:
    """Make metadata by which a command's field takes the options of other dataclasses as a mapping.

    Only options that were given are in it: a file stands in for the others, then the defaults.
    """
    return {_REST: Rest(kinds, without, aliases)}


class _Option(TypedDict, total=False):
    """Arguments of ``add_argument``."""

    type: Callable[[str], object]
    action: _Action
    nargs: str
    const: bool
    choices: Sequence[object]
    metavar: str
    help: str
    default: object
    required: bool


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print an error in one line with where to find help, and exit."""
        self.exit(FAILED, f"{self.prog}: error: {visible(message)} (see {self.prog} --help)\n")


def add_command(
    commands: "argparse._SubParsersAction[Parser]", name: str, kind: type[Command]
) -> None:
    """Add a command to the parser; parsed values get ``command``, which makes the command."""
    told = cleandoc(kind.__doc__ or "").partition("\n\nAttributes:")[0]
    first = told.partition("\n")[0].rstrip(".")
    parser = commands.add_parser(
        name, help=first[:1].lower() + first[1:], description=" ".join(told.split())
    )
    for f in fields(kind):
        rest = f.metadata.get(_REST)
        if rest is None:
            _add(parser, kind, f, *([] if f.default is MISSING else [f.default]))
            continue
        for option, (other, part) in rest.options.items():
            alias = rest.aliases.get(option)
            _add(parser, other, part, argparse.SUPPRESS, alias=alias)
    parser.set_defaults(command=partial(_made, kind))


def _made(kind: type[Command], values: dict[str, object]) -> Command:
    """Make a command of parsed values."""
    for f in fields(kind):
        if (rest := f.metadata.get(_REST)) is not None:
            names = rest.options.keys() & values.keys()
            values[f.name] = {name: values.pop(name) for name in names}
    return kind(**values)


def _add(
    parser: Parser, kind: type, f: "Field[object]", *default: object, alias: str | None = None
) -> None:
    """Add a field to the parser as an option."""
    how = _how(get_type_hints(kind, include_extras=True)[f.name])
    how["help"] = _explained(kind).get(f.name, "").replace("%", "%%")
    if "positional" in f.metadata:
        parser.add_argument(f.name, **{**how, "metavar": f.name})
        return
    if "switch" in f.metadata:
        how["action"] = "store_true"
    how |= {"default": default[0]} if default else {"required": True}
    flag = f.name.replace("_", "-")
    flags = [f"--{flag}", *([alias] if alias else [])]
    parser.add_argument(*flags, dest=f.name, **how)
    if how.get("nargs") == "?":
        no = {"action": "store_false", "default": how.get("default")}
        parser.add_argument(f"--no-{flag}", dest=f.name, **no)


def _explained(kind: type) -> dict[str, str]:
    """Read the description of each field from the docstring; none under ``python -OO``."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        listed = cleandoc(one.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        entries = re.split(r"^ {4}(\w+): ", listed, flags=re.MULTILINE)[1:]
        pairs = zip(entries[::2], entries[1::2], strict=True)
        found |= {name: " ".join(text.split()).rstrip(".") for name, text in pairs}
    return found


def _how(hint: object) -> _Option:
    """Translate a type hint to arguments of ``add_argument``."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        mark = parts[1]
        if isinstance(mark, Whole):
            return {"type": partial(_whole, mark)}
        if isinstance(mark, Place):
            return {"type": expanded, "metavar": mark.metavar}
    if origin in (Union, UnionType):
        kinds = [part for part in parts if part is not NoneType]
        if kinds == [bool, str]:
            return {"nargs": "?", "const": True, "metavar": "PLACE"}
        return _how(kinds[0])
    if origin is Literal:
        return {"choices": parts}
    if origin is Sequence:
        return {"nargs": "+", **_how(parts[0])}
    known = {bool: {"action": argparse.BooleanOptionalAction}, float: {"type": float}}
    return known.get(hint, {"type": _mapping} if origin is dict else {})


def _whole(bounds: Whole, text: str) -> int:
    number = int(text) if re.fullmatch("-?[0-9]{1,18}", text) else None
    if not is_whole(number, *bounds):
        raise argparse.ArgumentTypeError(f"got {shown(text)}, wanted {wanted(*bounds)}")
    return int(text)


def _mapping(text: str) -> dict[str, object]:
    from cachepress.structured import parse_yaml

    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a mapping such as '{{key: value}}'")
    return values
