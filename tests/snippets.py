"""Python snippets of a page, run in order as a user would paste them."""

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path


def snippets(page: Path) -> list[str]:
    """The blocks of Python on a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def printed(codes: Sequence[str], names: dict[str, object] | None = None) -> list[str]:
    """What each snippet prints, run one after the other with the same names."""
    names = {} if names is None else names
    out = []
    for code in codes:
        with redirect_stdout(io.StringIO()) as text:
            exec(compile(code, "<snippet>", "exec"), names)
        out.append(text.getvalue().strip("\n"))
    return out
