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
    printed = []
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), names)
        printed.append(capsys.readouterr().out.strip())
    piped, generated, _, asked, _ = printed
    assert piped == (
        "{'answers': ['The ship is Aurora.', 'The harbour opens at 6 in the morning.']}"
    )
    assert f"`{piped}`" in README.read_text(encoding="utf-8")
    size, continued = generated.splitlines()
    assert re.search(r"rows_seen=32490, rows_held=16200\b", size)
    assert continued.strip() == "Aurora."
    assert names["cache"].get_seq_length() == names["ids"].shape[1]
    assert (tmp_path / "document.safetensors").exists()
    ship, hour = asked.splitlines()
    assert ship == "The ship is Aurora." and "at 6" in hour
    press = names["LoudValuesPress"](0.5)
    assert names["cp"].parse(repr(press)) == press
