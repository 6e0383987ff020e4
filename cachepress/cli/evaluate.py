"""Commands that evaluate presses on data sets, and score what they answered."""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from cachepress.cli.arguments import POSITIONAL, SWITCH, Command, given
from cachepress.cli.console import log, say, warn_if_nothing_evicted
from cachepress.options import EvaluationFields, FileName, SweepFields

GOES_ON = "every finished context is on disk, the same command goes on"
OF_SWEEP = ("press", "compression_ratio", "dataset", "data_dir", "model")
"""What a sweep has several of."""


@dataclass(frozen=True)
class Evaluate(Command):
    """Evaluate a press on a data set.

    Options come before the config file, and that comes before the defaults: no_press with the
    built-in model and data, offline.

    Attributes:
        config: YAML file with any of these options.
    """

    KEPT: ClassVar[str] = GOES_ON
    config: FileName | None = None
    options: dict[str, object] = field(
        default_factory=dict, metadata=given(EvaluationFields, press="--press-name")
    )

    def run(self) -> None:
        """Answer what is not answered yet, and print the scores."""
        from cachepress.evaluation.config import load_config
        from cachepress.evaluation.runner import EvaluationRunner
        from cachepress.evaluation.summary import notes_of, results_table, task_table

        config = load_config(self.config, self.options)
        log(config.log_level)
        warn_if_nothing_evicted(config.make_press())
        runner = EvaluationRunner(config)
        metrics = runner.evaluate()
        say(f"{task_table(metrics)}\n\n{results_table([(config.press, metrics)])}")
        for note in notes_of(config, metrics):
            say(f"\n{note}")
        say(f"\nresults: {runner.results_dir}")


@dataclass(frozen=True)
class Sweep(Command):
    """Evaluate presses at ratios on data sets, with one prefill of a context for all.

    A context is read once for all presses that can share a reading; the plan says which cannot.
    Options come before the config file. Every finished context is on disk; the same command goes
    on.

    Attributes:
        config: YAML file with any of these options.
        markdown: write the tables to a file, too.
        csv: write a table for spreadsheets, too.
        dry_run: print the plan, and do nothing.
    """

    KEPT: ClassVar[str] = GOES_ON
    config: FileName | None = None
    options: dict[str, object] = field(
        default_factory=dict, metadata=given(SweepFields, EvaluationFields, without=OF_SWEEP)
    )
    markdown: FileName | None = None
    csv: FileName | None = None
    dry_run: bool = field(default=False, metadata=SWITCH)

    def run(self) -> None:
        """Answer what is not answered yet, and print and write the tables."""
        from cachepress.evaluation.records import write_atomically
        from cachepress.evaluation.summary import sweep_page, sweep_sheet, sweep_text
        from cachepress.evaluation.sweep import load_sweep, run_sweep

        config = load_sweep(self.config, self.options)
        log(str(config.options.get("log_level", "INFO")))
        results = run_sweep(config, only_plan=self.dry_run)
        if self.dry_run:
            return
        say(sweep_text(results))
        if self.markdown is not None:
            command = f"cachepress {shlex.join(sys.argv[1:])}"
            write_atomically(Path(self.markdown), sweep_page(results, command))
        if self.csv is not None:
            write_atomically(Path(self.csv), sweep_sheet(results))
        say(f"\nresults: {config.output_dir}")


@dataclass(frozen=True)
class Score(Command):
    """Score answers again, without the model.

    The answers of finished runs are scored by their own metric or another.

    Attributes:
        results: folder of results, such as ./results.
        metric: a metric for all samples (default: each sample's own).
    """

    results: FileName = field(metadata=POSITIONAL)
    metric: str | None = None

    def run(self) -> None:
        """Score them, write the scores back, and print them."""
        from cachepress.evaluation.rescore import score_again
        from cachepress.evaluation.summary import results_table

        log()
        found = score_again(Path(self.results), self.metric)
        say(results_table([(folder.name, metrics) for folder, metrics in found]))


@dataclass(frozen=True)
class Demo(Command):
    """Compare presses on the built-in model and data.

    Attributes:
        output_dir: where results go (default: ./results).
    """

    KEPT: ClassVar[str] = GOES_ON
    output_dir: FileName = "./results"

    def run(self) -> None:
        """Evaluate them, time them, and print both tables."""
        from cachepress.evaluation.demo import run_demo

        log()
        say(run_demo(self.output_dir))
