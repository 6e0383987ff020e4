"""Every Python snippet of the README runs, in order, as a user would paste them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.builtin_model
def test_snippets_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), names)
    assert len(snippets) == 5
    out = capsys.readouterr().out
    assert "Aurora" in out
    assert "rows_held=" in out
    assert names["cache"].get_seq_length() == names["ids"].shape[1]
    assert (tmp_path / "document.safetensors").exists()
    ship, hour = out.strip().splitlines()[-2:]
    assert "Aurora" in ship and "at 6" in hour
    press = names["LoudValuesPress"](0.5)
    assert names["cp"].parse(repr(press)) == press
