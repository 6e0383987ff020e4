"""Text to press and back: one spelling in Python, on the command line, in YAML and in results.

The spelling is ``repr(press)``. It is parsed as literals and known names only; nothing of it is
ever evaluated as code.
"""

import ast
import difflib
from dataclasses import MISSING, fields

from cachepress.errors import CachepressError
from cachepress.presses import BasePress
from cachepress.presses.base import all_presses

NO_PRESS = "no_press"
REFUSED = {
    "restorekv": "RestoreKV (arXiv:2608.01247) keeps rows that are no tokens of the text, made by "
    "a trained adapter of the model's own weights; a cache of ours holds rows of the text only, "
    "and no weights are changed: use KVzipPress, which it starts from",
}
"""Published methods that are not here, and why."""


class SpecError(CachepressError):
    """A text that is no press."""


def parse(text: str) -> BasePress | None:
    """The press that a text spells; None for ``no_press``.

    Args:
        text: an alias (``snapkv``), a spelling (``SnapKVPress(window_size=32)``), or a mixture
            (``snapkv(compression_ratio=0.5)``).

    Raises:
        SpecError: if the text is not a spelling of a known press, or an option is wrong.
    """
    if text.strip() == NO_PRESS:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise SpecError(
            f"press {text!r} cannot be read: wanted a name such as snapkv, or a spelling such as "
            "SnapKVPress(compression_ratio=0.5)"
        ) from error
    press = _build(tree, text)
    if not isinstance(press, BasePress):
        raise SpecError(f"press {text!r} is not a press: known are {', '.join(known_names())}")
    return press


def brief(press: BasePress, ratio: float) -> str:
    """The shortest spelling of a press whose ratio is said apart, such as ``adakv(snapkv)``.

    Args:
        press: the press.
        ratio: the compression ratio that is left out, wherever it stands.
    """
    shown = []
    for field in fields(press):  # type: ignore
        value = getattr(press, field.name)
        if field.name.endswith("compression_ratio"):
            plain = value == ratio
        else:
            plain = field.default is not MISSING and value == field.default
        if not plain:
            text = _brief_value(value, ratio)
            shown.append(text if field.default is MISSING else f"{field.name}={text}")
    name = press.alias or type(press).__name__
    return f"{name}({', '.join(shown)})" if shown else name


def aliases() -> dict[str, type[BasePress]]:
    """Every press class that has a short name, by it."""
    return dict(sorted((kind.alias, kind) for kind in all_presses() if kind.alias))


def known_names() -> list[str]:
    """Every name that ``parse`` knows, aliases first."""
    names = {kind.__name__ for kind in all_presses()} - {"ScorerPress", "WrapperPress"}
    classes = sorted(name for name in names if not name.startswith("_"))
    return [NO_PRESS, *aliases(), *classes]


def _brief_value(value: object, ratio: float) -> str:
    if isinstance(value, BasePress):
        return brief(value, ratio)
    if isinstance(value, list | tuple):
        items = [_brief_value(item, ratio) for item in value]
        return f"[{', '.join(items)}]"
    return repr(value)


def _build(node: ast.expr, text: str) -> object:
    if isinstance(node, ast.Name):
        return _call(_class(node.id), [], {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        kind = _class(node.func.id)
        args = [_build(arg, text) for arg in node.args]
        options = {str(k.arg): _build(k.value, text) for k in node.keywords}
        return _call(kind, args, options)
    if isinstance(node, ast.List | ast.Tuple):
        items = [_build(item, text) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        part = ast.unparse(node)
        raise SpecError(f"press {text!r}: {part!r} is neither a literal nor a press") from error


def _class(name: str) -> type[BasePress]:
    for kind in all_presses():
        if name in (kind.alias, kind.__name__):
            return kind
    if (reason := REFUSED.get(name.lower().removesuffix("press"))) is not None:
        raise SpecError(f"press {name!r}: {reason}")
    close = difflib.get_close_matches(name, known_names(), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise SpecError(f"unknown press {name!r}: {hint}known are {', '.join(known_names())}")


def _call(kind: type[BasePress], args: list[object], options: dict[str, object]) -> BasePress:
    known = [field.name for field in fields(kind)]  # type: ignore
    for name in options:
        if name not in known:
            raise SpecError(f"{kind.__name__} has no option {name!r}: it has {', '.join(known)}")
    try:
        return kind(*args, **options)
    except TypeError as error:
        raise SpecError(f"{kind.__name__}: {error}; its options are {', '.join(known)}") from error
