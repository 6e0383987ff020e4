"""Parses text to a press: one spelling in Python, on the command line, in YAML and in results.

The spelling is ``repr(press)``. It is parsed as literals and names of presses; it is never
evaluated as code.
"""

import ast
import difflib
import inspect
import logging
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, replace
from functools import cache

from cachepress.errors import CachepressError
from cachepress.kvpress_names import PREFIX, SPELLINGS
from cachepress.limits import DEEPEST_SPELLING, LONGEST_SHOWN, LONGEST_SPELLING, shown
from cachepress.press import all_presses
from cachepress.presses import BasePress
from cachepress.presses.composed import ComposedPress
from cachepress.presses.restorekv import REASON as RESTOREKV

logger = logging.getLogger(__name__)
NO_PRESS = "no_press"
_ABSTRACT = {"ScorerPress", "WrapperPress"}
REFUSED = {"restorekv": RESTOREKV}
"""Published methods that are not here, and why."""


class SpecError(CachepressError):
    """A text that does not spell a press."""


def parse(text: str) -> BasePress | None:
    """Parse the spelling of a press; None for ``no_press``.

    Args:
        text: an alias (``snapkv``), a spelling (``SnapKVPress(window_size=32)``), or a mixture
            (``snapkv(compression_ratio=0.5)``); or ``kvpress:NAME`` for what kvpress's evaluation
            runs under a name, which is also what a name means that is no alias here.

    Raises:
        SpecError: if the text is not a spelling of a known press, or an option is wrong.
    """
    if not isinstance(text, str):
        raise SpecError(f"press: got {shown(text)}, wanted its spelling, a text")
    if len(text) > LONGEST_SPELLING:
        raise SpecError(
            f"press: got {len(text):,} characters, wanted at most {LONGEST_SPELLING:,}: "
            f"{shown(text)}"
        )
    if text.strip() in (NO_PRESS, PREFIX + NO_PRESS):
        return None
    try:
        press = _spelled(text)
    except CachepressError:
        raise
    except (RecursionError, MemoryError) as error:
        raise SpecError(f"press {shown(text)} is nested too deeply") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise SpecError(f"press {shown(text)}: {error}") from error
    if not isinstance(press, BasePress):
        raise SpecError(f"press {shown(text)} is not a press: known are {', '.join(known_names())}")
    return press


def _spelled(text: str) -> object:
    spelling, theirs = text.strip().removeprefix(PREFIX), text.strip().startswith(PREFIX)
    tree = _tree(spelling)
    if not theirs and isinstance(tree, ast.Name):
        _say_what_differs(tree.id)
    return _build_theirs(tree, text) if theirs else _build(tree, text)


def _tree(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            # Python warns of text that would be odd as code, which a spelling is not.
            warnings.simplefilter("ignore")
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise SpecError(
            f"press {shown(text)} cannot be read: wanted a name such as snapkv, or a spelling such "
            "as SnapKVPress(compression_ratio=0.5)"
        ) from error


def brief(press: BasePress, ratio: float) -> str:
    """Spell a press shortly, without its compression ratio, such as ``adakv(snapkv)``.

    Args:
        press: the press.
        ratio: the compression ratio that is omitted wherever it stands.
    """
    parts = []
    for field in fields(press):  # type: ignore
        value = getattr(press, field.name)
        if field.name.endswith("compression_ratio"):
            plain = value == ratio
        else:
            plain = field.default is not MISSING and value == field.default
        if not plain:
            text = _brief_value(value, ratio)
            parts.append(text if field.default is MISSING else f"{field.name}={text}")
    name = press.alias or type(press).__name__
    return f"{name}({', '.join(parts)})" if parts else name


def aliases() -> dict[str, type[BasePress]]:
    """Return every press class that has a short name, by that name."""
    return dict(sorted((kind.alias, kind) for kind in all_presses() if kind.alias))


def known_names() -> list[str]:
    """Return every name that ``parse`` knows, aliases first."""
    names = {kind.__name__ for kind in all_presses()} - _ABSTRACT
    classes = sorted(name for name in names if not name.startswith("_"))
    return [NO_PRESS, *aliases(), *classes]


def _brief_value(value: object, ratio: float) -> str:
    if isinstance(value, BasePress):
        return brief(value, ratio)
    if isinstance(value, list | tuple):
        items = [_brief_value(item, ratio) for item in value]
        return f"[{', '.join(items)}]"
    return repr(value)


def _build_theirs(node: ast.expr, text: str, depth: int = 0) -> BasePress:
    """Build the press that kvpress means by a name, with options of its own."""
    function = node.func if isinstance(node, ast.Call) else node
    if not isinstance(function, ast.Name) or function.id not in SPELLINGS:
        name = text.strip().removeprefix(PREFIX).partition("(")[0]
        close = difflib.get_close_matches(name[:LONGEST_SHOWN], SPELLINGS, n=1, cutoff=0.5)
        hint = f"did you mean {PREFIX + close[0]!r}? " if close else ""
        if name in known_names():
            hint = f"{name} is a name of this package, leave {PREFIX!r} out; "
        raise SpecError(f"unknown press {shown(text)}: {hint}known are {', '.join(SPELLINGS)}")
    press = parse(SPELLINGS[function.id])
    if press is None:
        raise SpecError(f"press {shown(text)}: {NO_PRESS} stands alone")
    given = node.args if isinstance(node, ast.Call) else []
    args = [_build(arg, text, depth + 1) for arg in given]
    options = _options(node, text, depth + 1)
    if len(args) > 1 or (args and "compression_ratio" in options):
        raise SpecError(f"press {shown(text)}: wanted one ratio, and options by name")
    if args and isinstance(press, ComposedPress):
        options["compression_ratio"] = args[0]
    elif args:
        press = press.with_ratio(args[0])  # type: ignore
    return _with_options(press, options)


def _with_options(press: BasePress, options: Mapping[str, object]) -> BasePress:
    """Set options of a press; of a composed one, of each press that has them."""
    if isinstance(press, ComposedPress):
        shares = [{k: v for k, v in options.items() if _has(inner, k)} for inner in press.presses]
        if unknown := set(options).difference(*shares):
            raise SpecError(f"none of {press!r} has an option {min(unknown)!r}")
        pairs = zip(press.presses, shares, strict=True)
        return ComposedPress([_with_options(inner, share) for inner, share in pairs])
    for name, value in options.items():
        if not _has(press, name):
            known = ", ".join(field.name for field in fields(press))  # type: ignore
            raise SpecError(f"{type(press).__name__} has no option {name!r}: it has {known}")
        by_ratio = name == "compression_ratio" and isinstance(value, int | float)
        press = press.with_ratio(value) if by_ratio else replace(press, **{name: value})  # type: ignore
    return press


def _has(press: BasePress, option: str) -> bool:
    if option in {field.name for field in fields(press)}:  # type: ignore
        return True
    return option == "compression_ratio" and isinstance(getattr(press, option, None), int | float)


@cache
def _say_what_differs(name: str) -> None:
    """Warn once where a name means another press in kvpress than here."""
    kind, theirs = aliases().get(name), SPELLINGS.get(name)
    if kind is None or theirs is None or theirs == NO_PRESS or _needs_arguments(kind):
        return
    ours, other = kind(), parse(theirs)
    with suppress(CachepressError):
        # They may differ in their default ratio, which does not count.
        ours, other = ours.with_ratio(0.5), other and other.with_ratio(0.5)
    if ours != other:
        logger.warning(
            f"{name} is {kind.__name__}() here, and {theirs} in kvpress: write {PREFIX}{name} for "
            "that"
        )


def _needs_arguments(kind: type[BasePress]) -> bool:
    parameters = inspect.signature(kind).parameters.values()
    return any(p.default is inspect.Parameter.empty for p in parameters)


def _build(node: ast.expr, text: str, depth: int = 0) -> object:
    if depth > DEEPEST_SPELLING:
        raise SpecError(f"press {shown(text)} is nested more than {DEEPEST_SPELLING} deep")
    if isinstance(node, ast.Name):
        kind = aliases().get(node.id)
        if node.id in SPELLINGS and (kind is None or _needs_arguments(kind)):
            return _build_theirs(node, text, depth)
        return _call(_class(node.id), [], {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id in SPELLINGS and node.func.id not in aliases():
            return _build_theirs(node, text, depth)
        kind = _class(node.func.id)
        args = [_build(arg, text, depth + 1) for arg in node.args]
        return _call(kind, args, _options(node, text, depth + 1))
    if isinstance(node, ast.List | ast.Tuple):
        items = [_build(item, text, depth + 1) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        part = ast.unparse(node)
        raise SpecError(
            f"press {shown(text)}: {shown(part)} is neither a literal nor a press"
        ) from error


def _options(node: ast.expr, text: str, depth: int) -> dict[str, object]:
    """Build the keyword arguments of a call."""
    options: dict[str, object] = {}
    for keyword in node.keywords if isinstance(node, ast.Call) else []:
        if keyword.arg is None or keyword.arg in options:
            name = "**" if keyword.arg is None else keyword.arg
            raise SpecError(
                f"press {shown(text)}: wanted every option by its name and once, got {name}"
            )
        options[keyword.arg] = _build(keyword.value, text, depth)
    return options


def _class(name: str) -> type[BasePress]:
    for kind in all_presses():
        if name in (kind.alias, kind.__name__) and kind.__name__ not in _ABSTRACT:
            return kind
    if (reason := REFUSED.get(name.lower().removesuffix("press"))) is not None:
        raise SpecError(f"press {shown(name)}: {reason}")
    close = difflib.get_close_matches(name[:LONGEST_SHOWN], known_names(), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise SpecError(f"unknown press {shown(name)}: {hint}known are {', '.join(known_names())}")


def _call(kind: type[BasePress], args: list[object], options: dict[str, object]) -> BasePress:
    known = [field.name for field in fields(kind)]  # type: ignore
    known += [name for name in inspect.signature(kind).parameters if name not in known]
    for name in options:
        if name not in known:
            raise SpecError(
                f"{kind.__name__} has no option {shown(name)}: it has {', '.join(known)}"
            )
    try:
        return kind(*args, **options)
    except CachepressError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise SpecError(f"{kind.__name__}: {error}; its options are {', '.join(known)}") from error
