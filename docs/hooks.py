"""Fills the page of presses by class when the site is built, and gives wide tables their room."""

import re
from pathlib import Path

from mkdocs.structure.pages import Page

PRESSES = Path(__file__).parents[1] / "cachepress" / "presses" / "__init__.py"
BASES = {"BasePress", "ScorerPress", "WrapperPress"}
WIDE = {"benchmarks.md", "coming-from-kvpress.md", "leaderboard.md", "presses.md"}
"""Pages whose tables take the room of the table of contents, too."""


def on_page_markdown(markdown: str, page: Page, config: object, files: object) -> str:
    """Put the reference of every press where a page asks for it; hide a wide page's contents."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    names = {*re.findall(r" as (\w+Press)\b", PRESSES.read_text(encoding="utf-8"))} - BASES
    entry = "::: cachepress.presses.{}\n    options:\n      members: false\n"
    entries = [entry.format(name) for name in sorted(names, key=str.lower)]
    return markdown.replace("<!-- every press -->", "\n".join(entries))
