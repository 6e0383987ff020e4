"""The notebooks run from top to bottom, and show what they say; they are kept without outputs."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"


def executed(name: str) -> tuple[str, int]:
    """What a notebook prints, and how many pictures it shows."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    text = "".join(out.text for out in outputs if out.get("name") == "stdout")
    return text, sum("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.docs
@pytest.mark.builtin_model
def test_a_first_compression_answers_from_a_quarter_and_draws_two_pictures():
    text, pictures = executed("first_compression.ipynb")
    lines = text.splitlines()
    assert re.fullmatch(r" 15\.\d MiB, 0% evicted: .*Aurora.*", lines[0])
    assert re.fullmatch(r"  4\.\d MiB, 75% evicted: The ship is Aurora\.", lines[1])
    kept, pairs = map(int, re.match(r"(\d+) of (\d+) pairs", lines[2]).groups())
    assert (kept, pairs) == (90 * 90, 90 * 361)
    assert pictures == 2


@pytest.mark.docs
@pytest.mark.builtin_model
def test_comparing_presses_ranks_them_by_divergence():
    text, pictures = executed("comparing_presses.ipynb")
    found = {line.split()[0]: line.split()[1:] for line in text.splitlines()[:5]}
    assert [*found] == ["kvzip", "leverage", "keydiff", "snapkv", "random"]
    at_half = {name: float(values[1]) for name, values in found.items()}
    assert 0 < at_half["kvzip"] < at_half["random"]
    forms = [float(line.split()[-1]) for line in text.splitlines()[5:]]
    assert len(forms) == 3 and min(forms) > 0
    assert pictures == 1


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 3
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
