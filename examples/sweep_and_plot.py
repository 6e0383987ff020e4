"""Compare presses at several ratios, and plot what they lose.

One sweep reads every context once for all presses and ratios. Its table has a line for each result,
with the ends of the 95 % intervals.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(tempfile.gettempdir(), "cachepress_sweep.png")

with tempfile.TemporaryDirectory() as folder:
    table = Path(folder, "table.csv")
    sweep = "sweep --presses keydiff knorm random --ratios 0.25 0.5 0.75"
    data = "--datasets builtin:single_repeat-300 --fraction 0.3"
    where = ["--output-dir", folder, "--csv", str(table)]
    command = [sys.executable, "-m", "cachepress", *sweep.split(), *data.split(), *where]
    subprocess.run(command, check=True, capture_output=True)
    results = pd.read_csv(table)

print(results.pivot_table("score", "press", "nominal ratio").to_string())
for press, rows in results.sort_values("nominal ratio").groupby("press"):
    errors = [rows["score"] - rows["score low"], rows["score high"] - rows["score"]]
    plt.errorbar(rows["nominal ratio"], rows["score"], errors, label=press, marker="o", capsize=3)
plt.xlabel("share of key-value pairs removed")
plt.ylabel("score, with 95 % intervals")
plt.legend()
plt.savefig(PICTURE, dpi=120)
print(f"picture: {PICTURE}")
