"""Runs the demonstration: several presses on the built-in model, in answers, bytes and seconds."""

from collections.abc import Sequence
from pathlib import Path

from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.records import write_atomically
from cachepress.evaluation.runner import Result
from cachepress.evaluation.speed import speed_lines
from cachepress.evaluation.summary import quality_table, speed_table
from cachepress.evaluation.sweep import SweepConfig, run_sweep
from cachepress.models.loading import load
from cachepress.spec import parse
from cachepress.train import windows_of

PRESSES = (
    "kvzip",
    "keydiff",
    "adakv(expected_attention(epsilon=0.01))",
    "snapkv",
    "knorm",
    "random",
)
IN_SIGHT = ("snapkv(window_size=16)",)
"""Presses that are shown with the question in sight: the window is about as long as a question."""
RATIOS = (0.5, 0.75)
PART = "single_prose-1000"
FAST = ("keydiff(0.5)", "keydiff(0.75)", "keydiff(0.9)")
"""Presses whose decoding is timed; what they keep is alike for all presses of a ratio."""
LENGTH = 8000
"""Tokens of the text after which decoding is timed: attention to it is most of a step."""


def run_demo(output_dir: str = "./results", data_dir: str = PART, length: int = LENGTH) -> str:
    """Evaluate what is not done yet, time decoding, and write the tables to ``demo.md``.

    Args:
        output_dir: where results go.
        data_dir: part of the built-in data.
        length: tokens of the text after which decoding is timed.

    Returns:
        The tables, and how to read them.
    """
    groups = [
        _swept(PRESSES, "no", output_dir, data_dir),
        _swept(IN_SIGHT, "yes", output_dir, data_dir),
    ]
    model, tokenizer = load(EvaluationConfig.model)
    (ids,) = windows_of(tokenizer, None, length, length, seed=0)
    presses = [press for text in FAST if (press := parse(text)) is not None]
    lines, metrics = speed_lines(model, ids, presses), groups[0][0].metrics
    assert metrics.score is not None
    quality = (
        f"{EvaluationConfig.model} on builtin {data_dir}: {metrics.score.contexts} contexts, "
        f"{metrics.score.samples} answers a line. Dropped: share of key-value pairs, measured. "
        "Score: share of right answers. Cache: bytes allocated for keys and values."
    )
    speed = (
        f"Decoding after {length:,} tokens of prose, one sequence: medians of steps taken in "
        f"turns. Measured on: {metrics.machine}"
    )
    write_atomically(
        Path(output_dir) / "demo.md",
        f"{quality_table(groups, 'github')}\n\n{quality}\n\n"
        f"{speed_table(lines, 'github')}\n\n{speed}\n",
    )
    return f"\n{quality_table(groups)}\n\n{quality}\n\n{speed_table(lines)}\n\n{speed}"


def _swept(presses: Sequence[str], aware: str, output_dir: str, data_dir: str) -> list[Result]:
    config = SweepConfig(
        presses=presses,
        ratios=RATIOS,
        datasets=[f"builtin:{data_dir}"],
        query_aware=aware,
        options={"output_dir": output_dir},
    )
    (results,) = run_sweep(config)
    return results
