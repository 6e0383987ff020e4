"""The README: its snippets run in order as a user would paste them; its figures are measured."""

import json
import re
from pathlib import Path

import pytest

import cachepress as cp
from tests.snippets import printed, snippets

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


@pytest.mark.builtin_model
def test_snippets_run_and_print_what_stands_beside_them():
    asked, used = printed(snippets(README))
    assert asked == "The ship is Aurora."
    continued, piped = used.splitlines()
    assert continued == "Aurora."
    assert piped == (
        "{'answers': ['The ship is Aurora.', 'The harbour opens at 6 in the morning.']}"
    )
    for line in (asked, continued, piped):
        assert f"`{line}`" in TEXT


def test_the_first_snippet_has_six_lines():
    code = snippets(README)[0]
    assert sum(bool(line) for line in code.splitlines()) == 6


def test_the_readme_fits_on_two_screens():
    assert len(TEXT.splitlines()) <= 120


def test_the_papers_name_the_version_that_is():
    wheel = f"cachepress-{cp.__version__}-py3-none-any.whl"
    assert wheel in TEXT
    assert wheel in (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    assert f"({cp.__version__})" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_figure_of_the_demo_is_measured():
    demo = json.loads((ROOT / "docs" / "benchmarks.json").read_text())["demo"]["table"]
    measured = [[cell.strip() for cell in line.split("|")[1:-1]] for line in demo.splitlines()]
    rows = re.findall(
        r"^\| (?:`(\w+)`|none).* \| ([\d.]+) \| ([\d.]+) \((.+)\) \| (.+ MiB) \|$", TEXT, re.M
    )
    assert len(rows) == 5
    for name, removed, score, interval, size in rows:
        row = [name or "no_press", "later", removed, score, interval]
        assert any(cells[:5] == row and cells[-1] == size for cells in measured), row
    speed = {tuple(cells[:2]): cells for cells in measured if len(cells) == 6}
    whole, tenth = speed["no_press", "0.000"], speed["keydiff", "0.900"]
    assert f"takes {whole[3]} ms" in TEXT
    assert f"and {tenth[3]} ms ({tenth[5]} times as fast)" in TEXT


def test_the_figures_beside_the_alternatives_are_measured():
    cells = json.loads((ROOT / "docs" / "benchmarks.json").read_text())["decode"]["long"]["cells"]
    shown = [f"{cell['held'] / 2**20:.0f} MiB, {_median(cell):.0f} ms" for cell in cells]
    (row,) = (line for line in TEXT.splitlines() if line.startswith("| after 8,192 tokens"))
    assert cells[-1]["press"].startswith("AdaKVPress(press=SnapKVPress(compression_ratio=0.9")
    assert f"| {shown[-1]} a token |" in row
    assert row.endswith(f"| {shown[0]} |")


def _median(cell: dict) -> float:
    times = sorted(cell["decode"])
    return 1000 * (times[(len(times) - 1) // 2] + times[len(times) // 2]) / 2
