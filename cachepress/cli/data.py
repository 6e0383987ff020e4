"""Commands that list benchmarks, models and presses, and convert benchmark files."""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from cachepress.cli.arguments import POSITIONAL, SWITCH, Command
from cachepress.cli.console import log, say
from cachepress.errors import CachepressError
from cachepress.options import BUILTIN, Count, FileName, Seed


@dataclass(frozen=True)
class ListData(Command):
    """Say which benchmarks there are, and their parts."""

    def run(self) -> None:
        """Print them."""
        from cachepress.evaluation.registry import DATASET_REGISTRY

        log()
        for task in DATASET_REGISTRY.values():
            say(f"{task.name:14} {task.about}")
            if task.parts:
                say(f"{'':14} --data-dir {', '.join(task.parts)}")


@dataclass(frozen=True)
class ConvertData(Command):
    """Write a benchmark's rows to a Parquet file.

    It is a file that --dataset takes.

    Attributes:
        dataset: name of a benchmark.
        data_dir: part of it.
        data_path: folder with its original files (default: the hub).
        prompts: prompts instead of ours, as for evaluate.
        model: whose tokenizer counts (smollm2-135m).
        seed: seed of what is generated (0).
        output: the Parquet file.
        trust_remote_code: run the code that a model's repository brings, having read it.
    """

    dataset: str = field(metadata=POSITIONAL)
    output: FileName
    data_dir: str | None = None
    data_path: str | None = None
    prompts: FileName | None = None
    model: str = BUILTIN
    seed: Seed = 0
    trust_remote_code: bool = False

    def run(self) -> None:
        """Load the benchmark, and write it."""
        from cachepress.evaluation.config import EvaluationConfig
        from cachepress.evaluation.samples import load_table
        from cachepress.evaluation.tasks.base import COLUMNS
        from cachepress.models.loading import load_tokenizer

        log()
        if Path(self.output).suffix != ".parquet":
            wanted = "wanted a file that ends in .parquet"
            raise CachepressError(f"--output: got {self.output!r}, {wanted}")
        config = EvaluationConfig(**{k: v for k, v in vars(self).items() if k != "output"})
        table = load_table(config, load_tokenizer(config.model, config.loading))
        table[list(COLUMNS)].to_parquet(self.output)
        contexts = table["context"].nunique()
        say(f"written: {self.output}, {len(table)} samples of {contexts} contexts")


@dataclass(frozen=True)
class Models(Command):
    """Say which models are built in, and where.

    Attributes:
        fetch: fetch what is not there yet.
        remove: delete what was fetched; the next use fetches it again.
    """

    fetch: bool = field(default=False, metadata=SWITCH)
    remove: bool = field(default=False, metadata=SWITCH)

    def run(self) -> None:
        """Print them."""
        from cachepress.models.builtin import BUILTIN_MODELS, describe
        from cachepress.models.loading import resolve

        if self.fetch and self.remove:
            raise CachepressError("got both --fetch and --remove: give one of them")
        if self.remove:
            return _remove_models()
        if self.fetch:
            for name in BUILTIN_MODELS:
                resolve(name)
        for model in describe():
            place = model.path or "not fetched yet: the first use fetches it"
            size = f" ({model.bytes_on_disk / 1e6:.0f} MB)" if model.path else ""
            say(f"{model.name}: {model.title}, {model.licence}, context {model.context_length}")
            say(f"  {place}{size}")
        say("any other name is a local folder or a hub name, and goes to transformers as it is")


def _remove_models() -> None:
    from cachepress.models.builtin import BUILTIN_MODELS, learned_home, remove

    for name in BUILTIN_MODELS:
        freed = remove(name)
        say(f"{name}: {f'removed, {freed / 1e6:.0f} MB' if freed else 'nothing was there'}")
    if (learned := learned_home()).is_dir():
        say(f"what presses learned of models is still in {learned}")


@dataclass(frozen=True)
class Presses(Command):
    """List the presses with their options.

    Attributes:
        page: write the page of all presses (Markdown).
        length: tokens to measure with (2048).
        steps: tokens to decode (20).
        repeats: repeats of everything (3).
    """

    page: FileName | None = None
    length: Count = 2048
    steps: Count = 20
    repeats: Count = 3

    def run(self) -> None:
        """Print them, or measure them and write the page."""
        if self.page is not None:
            self._write(self.page)
            return
        from cachepress.presses import ScorerPress
        from cachepress.spec import aliases

        known = list(aliases().values())
        for kind in (k for k in known if issubclass(k, ScorerPress)):
            _say_press(str(kind.alias), kind)
        say("\nwith budgets of their own, or around any of them and around each other:")
        for kind in (k for k in known if not issubclass(k, ScorerPress)):
            _say_press(str(kind.alias), kind)

    def _write(self, page: str) -> None:
        from cachepress.bench import BenchOptions
        from cachepress.catalogue import measure, write_page

        log()
        options = BenchOptions(lengths=(self.length,), steps=self.steps, repeats=self.repeats)
        write_page(page, measure(options, 0.5))


def _say_press(alias: str, kind: type) -> None:
    """Print a press with its options and defaults, and its description."""
    summary = (kind.__doc__ or "").strip().splitlines()[0]
    options = ", ".join(
        f.name if f.default is MISSING else f"{f.name}={f.default!r}"
        for f in fields(kind)
        if not f.kw_only
    )
    say(f"{alias:28} {kind.__name__}({options})\n{'':28} {summary}")
