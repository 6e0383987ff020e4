"""Every script of examples/ runs, and prints what it is there to show."""

import io
import re
import runpy
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHOWN = {
    "bounded_generation": r"text: 80, .* seen 79\n.*: \[43, 43, 43\], never more than 48\n",
    "chat_over_document": r"150 tokens, 50%.*\n.* nine.*\n.* 4821973\b.*\n.* The Inkwell\b",
    "compress_and_generate": r"tokens read: 361\nMiB: 15\.9 before, 4\.7 .*\n.* called Aurora\b",
    "image_text": r"0\.0: \[100, 100\] of 100 .*\n.*\nratio 0\.5: \[50, 50\] of 100 pairs",
    "long_prompt": r"in 23\.8% .*\n.*Aurora.*\n.*'online'}.* 23\.8% .*\n.*\n.*'int4'}.* 13\.8% ",
    "own_press": r"SurprisePress.* 50\.1% removed\n.*\nAdaKVPress.* 50\.1% .*\n.*\n.* 90\.0% ",
    "per_head_budgets": r"head: 4\.3 MiB\n(  layer \d+: \[90, 90, 90\] pairs, 270 in all\n){3}",
    "save_and_reuse": r"^1[12]\.\d% of an uncompressed cache's bytes on disk\n.*\n.*Aurora",
}
SLOW = {"sweep_and_plot": r"keydiff +\d.*\n.*knorm +\d.*\n.*random +\d.*\npicture: (.*\.png)\n"}


@cache
def printed(name: str) -> str:
    with redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return out.getvalue()


@pytest.mark.builtin_model
@pytest.mark.parametrize("name", SHOWN)
def test_an_example_prints_what_it_shows(name):
    out = printed(name)
    assert re.search(SHOWN[name], out), out


@pytest.mark.builtin_model
def test_heads_that_compete_hold_numbers_of_their_own_and_the_same_sum():
    parts = printed("per_head_budgets").split("compete: ")
    layers = [re.findall(r"\[(.*)\] pairs, (\d+)", part) for part in parts]
    assert [int(total) for _, total in layers[1]] == [270, 270, 270]
    assert any(len({*heads.split(", ")}) > 1 for heads, _ in layers[1])
    assert len({total for _, total in layers[2]}) > 1


@pytest.mark.docs
@pytest.mark.builtin_model
@pytest.mark.parametrize("name", SLOW)
def test_a_slow_example_prints_what_it_shows(name):
    out = printed(name)
    assert re.search(SLOW[name], out), out
    assert Path(re.search(SLOW[name], out)[1]).read_bytes().startswith(b"\x89PNG")


def test_every_example_is_tested_and_says_what_it_shows():
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == SHOWN.keys() | SLOW.keys()
    for name, text in scripts.items():
        assert re.match(r'""".+\.\n\n', text), name
        assert len(text.splitlines()) <= 60, name
