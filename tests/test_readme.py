"""Every Python snippet of the README runs, in order, as a user would paste them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.builtin_model
def test_snippets_run(capsys):
    names: dict[str, object] = {}
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), names)
    assert len(snippets) == 3
    out = capsys.readouterr().out
    assert "Aurora" in out
    assert "rows_held=" in out
    press = names["LoudValuesPress"](0.5)
    assert names["cp"].parse(repr(press)) == press
