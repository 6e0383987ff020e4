"""Fills the page of presses by class when the site is built: a new press is on it at once."""

import re
from pathlib import Path

PRESSES = Path(__file__).parents[1] / "cachepress" / "presses" / "__init__.py"
BASES = {"BasePress", "ScorerPress", "WrapperPress"}


def on_page_markdown(markdown: str, page: object, config: object, files: object) -> str:
    """Put the reference of every press where a page asks for it."""
    names = {*re.findall(r" as (\w+Press)\b", PRESSES.read_text(encoding="utf-8"))} - BASES
    entry = "::: cachepress.presses.{}\n    options:\n      members: false\n"
    entries = [entry.format(name) for name in sorted(names, key=str.lower)]
    return markdown.replace("<!-- every press -->", "\n".join(entries))
