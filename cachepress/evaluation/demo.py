"""The demonstration: four presses at two ratios on the built-in model and data, as one table."""

import sys
from pathlib import Path

from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.records import write_atomically
from cachepress.evaluation.runner import EvaluationRunner
from cachepress.evaluation.table import results_table
from cachepress.models import load

PRESSES = ("snapkv", "knorm", "random")
RATIOS = (0.5, 0.75)
PART = "multi_key-1000"


def run_demo(output_dir: str = "./results", data_dir: str = PART) -> str:
    """Evaluate every cell that is not done yet; the table is written to ``demo.md`` too.

    Returns:
        The table, and how to read it.
    """
    cells = [("no_press", 0.0), *((press, ratio) for press in PRESSES for ratio in RATIOS)]
    model = load(EvaluationConfig.model)
    rows = []
    for number, (press, ratio) in enumerate(cells, start=1):
        print(f"[{number}/{len(cells)}] {press} at {ratio}", file=sys.stderr, flush=True)
        config = EvaluationConfig(
            data_dir=data_dir, press=press, compression_ratio=ratio, output_dir=output_dir
        )
        rows.append((press, EvaluationRunner(config, model).run_evaluation()))
    score = rows[0][1]["score"]
    about = (
        f"{EvaluationConfig.model} on builtin {data_dir}: {score['contexts']} contexts, "
        f"{score['samples']} answers a line; the press does not see the questions.\n"
        "ratio: share of key-value pairs dropped, measured. score: share of right answers. "
        "cache: bytes allocated for keys and values, before and after."
    )
    markdown = f"{results_table(rows, 'github')}\n\n{about}\n"
    write_atomically(Path(output_dir) / "demo.md", markdown)
    return f"\n{results_table(rows)}\n\n{about}"
