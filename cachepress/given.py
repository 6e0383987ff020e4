"""Reads presses as people give them: a press, its spelling, or by mistake something else.

Whatever takes a press takes it by way of these functions, so that all accept the same, and refuse
the rest in the same words.
"""

import inspect

from cachepress.errors import CachepressError
from cachepress.limits import described
from cachepress.press import BasePress, WrapperPress

_RATIO = "compression_ratio=0.5"


def press_of(given: object, name: str = "press") -> BasePress | None:
    """Return the press that an argument means: a press, its spelling, or None for no press.

    Args:
        given: the argument.
        name: its name, for the error.

    Raises:
        CachepressError: if it is something else, such as the class of a press.
    """
    if given is None or isinstance(given, BasePress):
        return given
    if isinstance(given, str):
        from cachepress.spec import parse  # It knows every press, which most callers need not.

        return parse(given)
    if _is_press_class(given):
        wanted = f"a press made of it, such as {example(given)}"  # type: ignore
    else:
        wanted = f"a press, such as SnapKVPress({_RATIO}), or its spelling"
    raise CachepressError(f"{name}: got {_described(given)}, wanted {wanted}")


def inner_press(kind: type[WrapperPress], given: object) -> BasePress:
    """Return the press that a wrapper is given to wrap, by itself or spelled.

    Raises:
        CachepressError: if it is none.
    """
    press = press_of(given) if isinstance(given, str | BasePress) else None
    if press is not None:
        return press
    name, usual = kind.__name__, kind.usual
    inner = example(given) if _is_press_class(given) else f"{usual}({_RATIO})"  # type: ignore
    short = f"{kind.alias}({usual.removesuffix('Press').lower()}(0.5))"
    raise CachepressError(
        f"{name} wraps a press: got {_described(given)}, wanted for example {name}({inner})"
        f"{f', spelled {short}' if kind.alias else ''}"
    )


def check_needs_none(kind: type[WrapperPress]) -> None:
    """Raise CachepressError if a wrapper cannot be made without an inner press."""
    parameter = inspect.signature(kind).parameters.get("press")
    if parameter is not None and parameter.default is inspect.Parameter.empty:
        inner_press(kind, None)


def spelling_of(given: object, name: str = "press") -> object:
    """Return the spelling of a press that is given by itself; what is no press stays as it is.

    Raises:
        CachepressError: if it is the class of a press.
    """
    given = press_of(given, name) if _is_press_class(given) else given
    return repr(given) if isinstance(given, BasePress) else given


def spellings_of(given: object) -> object:
    """Return the spellings of a list of presses; what is no list stays as it is."""
    if not isinstance(given, list | tuple):
        return given
    return [spelling_of(press, "presses") for press in given]


def example(kind: type[BasePress]) -> str:
    """Write down how a press of a class is made."""
    if issubclass(kind, WrapperPress):
        return f"{kind.__name__}({kind.usual}({_RATIO}))"
    has_ratio = "compression_ratio" in inspect.signature(kind).parameters
    return f"{kind.__name__}({_RATIO if has_ratio else '...'})"


def _is_press_class(given: object) -> bool:
    return isinstance(given, type) and issubclass(given, BasePress)


def _described(given: object) -> str:
    return "none" if given is None else described(given)
