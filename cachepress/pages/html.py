"""Renders pages as single HTML files, with styles, scripts and data inside."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cachepress.evaluation.typed import plain

HERE = Path(__file__).parent


def render(template: str, values: Mapping[str, object]) -> str:
    """Render a page from a template, in which every text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data"] = as_data
    environment.filters["script"] = Markup
    environment.globals["asset"] = asset
    return environment.get_template(template).render(values)


def as_data(value: object) -> Markup:
    """Encode a value as JSON that is safe in a script element, whatever its texts are.

    All but ASCII is escaped, and so is what could end or open an element. A number that is not
    finite becomes null.
    """
    text = json.dumps(plain(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@cache
def asset(name: str) -> Markup:
    """Read a style or script of the package."""
    return Markup((HERE / name).read_text(encoding="utf-8"))
