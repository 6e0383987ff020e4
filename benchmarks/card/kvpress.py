"""Runs the same shape under kvpress, in an interpreter of its own where one is given."""

import json
import subprocess
import time
from functools import partial
from pathlib import Path

from benchmarks.card.lab import TINY_SHAPE, Cells, Lab, left_out
from benchmarks.card.plan import allowed
from benchmarks.card.records import Values
from cachepress.models.shapes import SHAPES

SCRIPT = Path(__file__).with_name("theirs.py")
NOT_GIVEN = "not measured: no interpreter that has kvpress was given (--kvpress-python)"


def kvpress(lab: Lab) -> Cells:
    """Give a cell for each press and length."""
    if lab.job.kvpress_python is None:
        yield "kvpress", partial(left_out, NOT_GIVEN)
        return
    runs = _Run(lab)
    for length in (lab.sizes.short, lab.sizes.long):
        for name in ("none", "SnapKV 0.9", "AdaKV(SnapKV) 0.9"):
            yield f"{name}, {length}", partial(runs.cell, f"{name}, {length}")


class _Run:
    """One process for all cells, started with the first."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._found: dict[str, Values] | None = None
        self._said = ""

    def cell(self, name: str) -> Values:
        """Return the figures of a cell."""
        if self._found is None:
            self._found = {}
            self._run()
        if name not in self._found:
            raise RuntimeError(f"kvpress ended before it: {self._said}")
        return self._found[name]

    def _run(self) -> None:
        lab, sizes = self._lab, self._lab.sizes
        lab.forget_models()
        assert lab.job.kvpress_python is not None and self._found is not None
        shape = {**SHAPES["llama-3.1-8b"][1], **(TINY_SHAPE if lab.job.tiny else {})}
        numbers = (sizes.layers, sizes.steps, sizes.short, sizes.long)
        left = max(1, min(lab.job.end - time.time(), allowed("kvpress", lab.job.minutes)))
        command = [lab.job.kvpress_python, "-P", str(SCRIPT), lab.job.device, *map(str, numbers)]
        process = subprocess.Popen(
            [*command, json.dumps(shape)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            out, said = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            process.kill()
            out, said = process.communicate()
            said += f"\nits {left:.0f} s were up"
        for line in out.splitlines():
            values = json.loads(line)
            self._found[values.pop("cell")] = values
        self._said = (said.strip().splitlines() or [f"code {process.returncode}"])[-1][:200]
