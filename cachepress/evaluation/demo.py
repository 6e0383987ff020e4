"""The demonstration: four presses at two ratios on the built-in model and data, as one table."""

from pathlib import Path

from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.records import write_atomically
from cachepress.evaluation.sweep import SweepConfig, run_sweep
from cachepress.evaluation.table import HOW_TO_READ, sweep_table

PRESSES = ("snapkv", "knorm", "random")
RATIOS = (0.5, 0.75)
PART = "multi_key-1000"


def run_demo(output_dir: str = "./results", data_dir: str = PART) -> str:
    """Evaluate every cell that is not done yet; the table is written to ``demo.md`` too.

    Returns:
        The table, and how to read it.
    """
    config = SweepConfig(
        presses=PRESSES,
        ratios=RATIOS,
        datasets=[f"builtin:{data_dir}"],
        options={"output_dir": output_dir},
    )
    (results,) = run_sweep(config)
    score = results[0].metrics["score"]
    about = (
        f"{EvaluationConfig.model} on builtin {data_dir}: {score['contexts']} contexts, "
        f"{score['samples']} answers a line; the press does not see the questions.\n{HOW_TO_READ}"
    )
    markdown = f"{sweep_table(results, 'github')}\n\n{about}"
    write_atomically(Path(output_dir) / "demo.md", markdown)
    return f"\n{sweep_table(results)}\n\n{about}"
