"""Commands that measure presses and train what they need."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from cachepress.cli.arguments import POSITIONAL, Command, given
from cachepress.cli.console import OnModel, log, say
from cachepress.files import read_text
from cachepress.options import BenchFields, Count, FileName, Seed

Kind = Literal["query_stats", "q_filters", "kvzap_linear", "kvzap_mlp", "fastkvzip", "lukv"]
"""What can be learned of a model."""


@dataclass(frozen=True)
class Bench(Command):
    """Time presses: prefill, decoding, bytes.

    They are timed against transformers' own cache: seconds of prefill, the share of it that the
    press takes, ms of a decoding step, bytes held after prefill and the peak of it. Runs are
    interleaved and repeated; medians are shown.

    Attributes:
        json: write every timing to a file.
    """

    options: dict[str, object] = field(default_factory=dict, metadata=given(BenchFields))
    json: FileName | None = None

    def run(self) -> None:
        """Time them, and print and write what it took."""
        from cachepress.bench import BenchOptions, bench_table, run_bench, write_json

        log()
        result = run_bench(replace(BenchOptions(), **self.options))
        say(bench_table(result))
        if self.json is not None:
            write_json(result, self.json)


@dataclass(frozen=True, kw_only=True)
class Train(OnModel):
    """Learn what a press has to know of a model.

    It is learned from any text, and left where that press looks for it.

    Attributes:
        kind: query_stats, q_filters, kvzap_linear, kvzap_mlp, fastkvzip, lukv.
        press: the press whose scores are judged (for lukv).
        text: text to learn from (default: built-in prose).
        tokens: tokens to read (20000).
        window: tokens of one context (1000).
        steps: steps of descent (300).
        seed: for what is drawn (0).
        output: where to write (default: where presses look).
    """

    KEPT: ClassVar[str] = "nothing was written, and nothing is lost"
    kind: Kind = field(metadata=POSITIONAL)
    press: str | None = None
    text: FileName | None = None
    tokens: Count = 20000
    window: Count = 1000
    steps: Count = 300
    seed: Seed = 0
    output: FileName | None = None

    def run(self) -> None:
        """Read the text, learn, and write what was learned."""
        from cachepress.spec import parse
        from cachepress.train import Training, train, windows_of

        log()
        text = None if self.text is None else read_text(self.text)
        model, tokenizer = self.loaded()
        model.config.name_or_path = model.config.name_or_path or self.model
        windows = windows_of(tokenizer, text, self.tokens, self.window, self.seed)
        press = None if self.press is None else parse(self.press)
        training = Training(model, windows, tokenizer, press, seed=self.seed, steps=self.steps)
        say(f"written: {train(self.kind, training, self.output)}")
