"""A sweep: presses, ratios, data sets and models, with one prefill of a context for all."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from cachepress.catalogue import own_presses, recommended
from cachepress.digests import model_digests
from cachepress.errors import CachepressError
from cachepress.evaluation.answering import shares_reading
from cachepress.evaluation.config import EvaluationConfig, same_data, same_model
from cachepress.evaluation.executors import EXECUTORS, Executor, Unit, WorkerOptions
from cachepress.evaluation.run import Run, allow_open_files, say_versions
from cachepress.evaluation.samples import Context, contexts_of, load_table
from cachepress.evaluation.statistics import Paired, paired
from cachepress.files import expanded
from cachepress.limits import check_whole, shown
from cachepress.models.loading import load_tokenizer, resolve
from cachepress.spec import parse
from cachepress.structured import read_mapping

logger = logging.getLogger(__name__)
EVERY_PRESS = "all"
AWARENESS = {"no": [False], "yes": [True], "both": [False, True]}
_OWN = ("press", "compression_ratio", "dataset", "data_dir", "model", "query_aware")


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep is made of.

    Attributes:
        presses: aliases or spellings; "all" for every press, in the form in which its authors
            recommend it. No press is always there.
        ratios: for each press that has one.
        datasets: names, with a part after a colon, such as "builtin:multi_key-1000".
        models: built-in names, local folders or hub names.
        query_aware: "no", "yes" or "both": whether presses see the question.
        executor: "serial", "process" or "ray".
        workers: of the executors that have some.
        batch_size: most sequences that are decoded at once, at least those of one press.
        kl: whether the divergence from the uncompressed model is measured.
        options: of each evaluation, see ``EvaluationConfig``.
    """

    presses: Sequence[str] = ("snapkv", "knorm")
    ratios: Sequence[float] = (0.25, 0.5, 0.75, 0.9)
    datasets: Sequence[str] = ("builtin",)
    models: Sequence[str] = (EvaluationConfig.model,)
    query_aware: str = "no"
    executor: str = "serial"
    workers: int = 1
    batch_size: int = 128
    kl: bool = False
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.query_aware, bool):  # What YAML makes of yes and no.
            object.__setattr__(self, "query_aware", "yes" if self.query_aware else "no")
        if not isinstance(self.kl, bool):
            raise CachepressError(f"kl: got {self.kl!r}, wanted true or false")
        for name in ("presses", "ratios", "datasets", "models"):
            value = getattr(self, name)
            kind = float | int if name == "ratios" else str
            if not isinstance(value, list | tuple) or not value:
                raise CachepressError(f"{name}: got {shown(value)}, wanted a list")
            for part in value:
                if not isinstance(part, kind) or isinstance(part, bool) or "\0" in str(part):
                    wanted = "numbers" if name == "ratios" else "texts"
                    raise CachepressError(f"{name}: got {shown(part)}, wanted {wanted}")
        for name, known in (("query_aware", AWARENESS), ("executor", EXECUTORS)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in known:
                raise CachepressError(
                    f"{name}: got {shown(getattr(self, name))}, wanted one of {', '.join(known)}"
                )
        for name in ("workers", "batch_size"):
            check_whole(name, getattr(self, name))

    @property
    def output_dir(self) -> Path:
        """Where results go."""
        return Path(expanded(str(self.options.get("output_dir", EvaluationConfig.output_dir))))

    @property
    def worker_options(self) -> WorkerOptions:
        """How the work is done."""
        return WorkerOptions(self.batch_size, self.kl, self.workers)

    def groups(self) -> list["Group"]:
        """The evaluations, by what they read."""
        found = []
        for model in _distinct(self.models, same_model):
            for dataset in _distinct(self.datasets, _same_part):
                for aware in AWARENESS[self.query_aware]:
                    name, _, part = dataset.partition(":")
                    what = {"dataset": name, "data_dir": part or None, "query_aware": aware}
                    options = {**self.options, **what, "model": model}
                    found.append(Group([Run(c) for c in self._configs(options)]))
        folders = [run.folder for group in found for run in group.runs]
        for folder in folders:
            if folders.count(folder) > 1:
                raise CachepressError(
                    f"two models or data sets would write to {folder}: sweep them one by one, with "
                    "an --output-dir each"
                )
        return found

    def _configs(self, options: Mapping[str, object]) -> list[EvaluationConfig]:
        plain = {k: v for k, v in options.items() if k != "storage"}
        configs = [EvaluationConfig(**plain)]
        for press in self._spellings():
            if options["query_aware"] and parse(press).needs.question:
                continue  # It is query-aware by itself, and there once already.
            for ratio in self.ratios if _has_ratio(press) else [None]:
                configs.append(EvaluationConfig(**options, press=press, compression_ratio=ratio))
        found: dict[Path, EvaluationConfig] = {}
        for config in configs:
            found.setdefault(config.get_results_dir(), config)
        return list(found.values())

    def _spellings(self) -> list[str]:
        named = [p for p in self.presses if p != EVERY_PRESS and parse(p) is not None]
        if EVERY_PRESS not in self.presses:
            return named
        return [*named, *(repr(recommended(kind, 0.5)) for kind in own_presses().values())]


@dataclass
class Group:
    """Evaluations that read the same contexts with the same model.

    Attributes:
        runs: the first one is without a press.
        table: the data set.
        contexts: what is read.
    """

    runs: list[Run]
    table: pd.DataFrame = field(init=False)
    contexts: list[Context] = field(init=False)

    @property
    def config(self) -> EvaluationConfig:
        """What all of them share."""
        return self.runs[0].config

    def load(self) -> None:
        """Load the data set."""
        tokenizer = load_tokenizer(self.config.model, self.config.loading)
        self.table = load_table(self.config, tokenizer)
        self.contexts = contexts_of(self.table)
        digests = model_digests(self.config.model, self.config.model_kwargs)
        for run in self.runs:
            run.identify(digests, resolve(self.config.model))
            run.adopt(self.contexts)

    def units(self, kl: bool) -> Iterator[Unit]:
        """What is left to do: contexts, with the runs that have not answered them."""
        for context in self.contexts:
            left = [run for run in self.runs if not run.has(context, kl and _measures(run))]
            if left:
                yield Unit(context, tuple(run.config for run in left))


@dataclass(frozen=True)
class Result:
    """What became of one run.

    Attributes:
        run: which one.
        metrics: as they stand in metrics.json.
        paired: how it differs from no press on the same samples; None for no press itself.
    """

    run: Run
    metrics: dict
    paired: Paired | None


def run_sweep(
    config: SweepConfig, quiet: bool = False, only_plan: bool = False
) -> list[list[Result]]:
    """Do what is not done yet.

    Args:
        config: the sweep.
        quiet: no progress bar.
        only_plan: say what would be done, and do nothing.

    Returns:
        The results of each group; of none after a plan.

    Raises:
        CachepressError: for every input that cannot work, before any work; nothing that was
            computed is lost.
    """
    groups = config.groups()
    if only_plan:
        for group in groups:
            for run in group.runs:
                run.peek()
            group.load()
        print(plan_of(config, groups, [list(group.units(config.kl)) for group in groups]))
        return []
    allow_open_files(sum(len(group.runs) for group in groups))
    with ExitStack() as stack:
        for group in groups:
            for run in group.runs:
                stack.enter_context(run.held())
                run.check_folder()
            group.load()
            say_versions(group.runs, group.contexts)
        executor = stack.enter_context(EXECUTORS[config.executor](config.worker_options))
        for group in groups:
            _check(config, group, executor)
        for run in (run for group in groups for run in group.runs):
            run.begin()
        left = [list(group.units(config.kl)) for group in groups]
        logger.info("%s", plan_of(config, groups, left))
        _work(groups, [unit for part in left for unit in part], executor, quiet)
        return [_results(group) for group in groups]


def plan_of(config: SweepConfig, groups: Sequence[Group], left: Sequence[Sequence[Unit]]) -> str:
    """What a sweep will do, in words."""
    lines = []
    for group, units in zip(groups, left, strict=True):
        one, samples = group.config, len(group.table)
        part = f":{one.data_dir}" if one.data_dir else ""
        aware = "query-aware" if one.query_aware else "query-agnostic"
        answers = sum(len(u.context.samples) * len(u.configs) for u in units)
        lines += [
            f"{one.model} on {one.dataset}{part}, {aware}: {len(group.runs)} runs, "
            f"{len(group.contexts)} contexts, {samples} samples; "
            f"{answers} of {samples * len(group.runs)} answers are left",
        ]
        shared = [run for run in group.runs if shares_reading(run)]
        replays = {c.config.press_name for c in shared if c.press and c.press.needs.reconstruction}
        apart = {c.config.press_name for c in group.runs if not shares_reading(c)}
        lines.append(f"  one prefill of a context for {len(shared)} runs")
        if replays:
            lines.append(f"  and one replay of it for each of: {', '.join(sorted(replays))}")
        if apart:
            lines.append(f"  a prefill of their own for: {', '.join(sorted(apart))}")
    if config.executor != "serial":
        lines.append(f"{config.workers} workers ({config.executor})")
    return "\n".join(lines)


def load_sweep(path: str | None, options: Mapping[str, object]) -> SweepConfig:
    """A config from a YAML file and options that come before it.

    Raises:
        CachepressError: if the file is missing, is not YAML, or has an unknown or wrong field.
    """
    values = {} if path is None else read_mapping(Path(path))
    values |= options
    own = {f.name for f in fields(SweepConfig)} - {"options"}
    known = {f.name for f in fields(EvaluationConfig)} - set(_OWN)
    for name in values:
        if name not in own | known:
            wanted = ", ".join(sorted(own | known))
            raise CachepressError(f"unknown option {shown(name)}: wanted one of {wanted}")
    given = {name: value for name, value in values.items() if name in own}
    return SweepConfig(**given, options={k: v for k, v in values.items() if k in known})


def _check(config: SweepConfig, group: Group, executor: Executor) -> None:
    """Refuse what cannot work; of "all" presses, those that do not fit the model are left out."""
    if not any(True for _ in group.units(config.kl)):
        return
    unfit = executor.check([run.config for run in group.runs], group.contexts)
    for folder, reason in unfit.items():
        run = next(run for run in group.runs if run.folder == folder)
        if EVERY_PRESS not in config.presses or run.config.press in config.presses:
            raise CachepressError(reason)
        logger.warning("left out: %s: %s", run.label, reason)
    group.runs = [run for run in group.runs if run.folder not in unfit]


def _work(groups: Sequence[Group], units: Sequence[Unit], executor: Executor, quiet: bool) -> None:
    """Answer what is left, and write each context's answers as they come."""
    runs = {run.folder: run for group in groups for run in group.runs}
    total = sum(len(unit.configs) for unit in units)
    with tqdm(total=total, unit="context", disable=quiet or not units) as bar:
        for unit, answered in executor.run(units):
            for folder, found in answered.found:
                runs[folder].save(unit.context, found)
            if answered.error is not None:
                raise CachepressError(answered.error)
            bar.update(len(answered.found))


def _results(group: Group) -> list[Result]:
    results: list[Result] = []
    base: pd.DataFrame | None = None
    for run in group.runs:
        predictions = run.predictions(group.table, group.contexts)
        metrics = run.write_views(predictions)
        base = predictions if base is None else base
        compared = None
        if run.press is not None and base["score"].notna().any():
            compared = paired(predictions, base)
        results.append(Result(run, metrics, compared))
    return results


def _distinct(names: Sequence[str], same: Callable[[str], str]) -> list[str]:
    """The names without those that mean the same as an earlier one."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(same(name), name)
    return list(found.values())


def _same_part(dataset: str) -> str:
    name, _, part = dataset.partition(":")
    return f"{same_data(name)}:{part}"


def _measures(run: Run) -> bool:
    """Whether a divergence can be measured: not where the press acts on what is decoded."""
    return run.press is None or not run.press.schedule.decodes


def _has_ratio(spelling: str) -> bool:
    press = parse(spelling)
    if press is None:
        raise CachepressError(f"{spelling!r} is no press")
    try:
        return press.with_ratio(0.5) != press.with_ratio(0.25)
    except CachepressError:
        return False
