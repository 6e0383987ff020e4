"""Runs sweeps of presses, ratios, data sets and models, with one prefill of a context for all."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

from cachepress.catalogue import own_presses, recommended
from cachepress.errors import CachepressError
from cachepress.evaluation.answering import shares_reading
from cachepress.evaluation.config import EvaluationConfig, same_data, same_model
from cachepress.evaluation.executors import EXECUTORS, Unit, WorkerOptions
from cachepress.evaluation.run import Run, allow_open_files
from cachepress.evaluation.runner import Group, Result, drive
from cachepress.files import expanded
from cachepress.given import spellings_of
from cachepress.limits import check_whole, shown
from cachepress.options import SweepFields
from cachepress.presses import BasePress
from cachepress.spec import parse
from cachepress.structured import read_mapping

logger = logging.getLogger(__name__)
EVERY_PRESS = "all"
AWARENESS = {"no": [False], "yes": [True], "both": [False, True]}
_OWN = ("press", "compression_ratio", "dataset", "data_dir", "model", "query_aware")


@dataclass(frozen=True)
class SweepConfig(SweepFields):
    """Checked options of a sweep: the fields of ``cachepress.options.SweepFields``.

    Attributes:
        options: of each evaluation, see ``EvaluationConfig``.
    """

    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.query_aware, bool):  # What YAML makes of yes and no.
            object.__setattr__(self, "query_aware", "yes" if self.query_aware else "no")
        if not isinstance(self.kl, bool):
            raise CachepressError(f"kl: got {self.kl!r}, wanted true or false")
        object.__setattr__(self, "presses", spellings_of(self.presses))
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
        """The folder of results."""
        return Path(expanded(str(self.options.get("output_dir", EvaluationConfig.output_dir))))

    @property
    def worker_options(self) -> WorkerOptions:
        """Options of the sweep's workers."""
        return WorkerOptions(self.batch_size, self.kl, self.workers)

    def groups(self) -> list[Group]:
        """Make the evaluations, grouped by model, data set and query awareness."""
        found = []
        for model in _distinct(self.models, same_model):
            for dataset in _distinct(self.datasets, _same_part):
                for aware in AWARENESS[self.query_aware]:
                    name, _, part = dataset.partition(":")
                    what = {"dataset": name, "data_dir": part or None, "query_aware": aware}
                    options = {**self.options, **what, "model": model}
                    configs = self._configs(options)
                    found.append(Group([Run(c, self._is_optional(c)) for c in configs]))
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
        configs = [replace(EvaluationConfig(), **plain)]
        for spelling, press in self._spellings().items():
            if options["query_aware"] and press.needs.question:
                continue  # It is query-aware by itself, and there once already.
            for ratio in self.ratios if _has_ratio(press) else [None]:
                own = {"press": spelling, "compression_ratio": ratio}
                configs.append(replace(EvaluationConfig(), **options, **own))
        found: dict[Path, EvaluationConfig] = {}
        for config in configs:
            found.setdefault(config.get_results_dir(), config)
        return list(found.values())

    def _is_optional(self, config: EvaluationConfig) -> bool:
        """Tell whether a run is left out if its press does not fit the model."""
        return EVERY_PRESS in self.presses and config.press not in self.presses

    def _spellings(self) -> dict[str, BasePress]:
        """Parse the presses, by their spellings, without "no press"."""
        named = {
            p: press for p in self.presses if p != EVERY_PRESS and (press := parse(p)) is not None
        }
        if EVERY_PRESS not in self.presses:
            return named
        every = [recommended(kind, 0.5) for kind in own_presses().values()]
        return named | {repr(press): press for press in every}


def run_sweep(
    config: SweepConfig, quiet: bool = False, only_plan: bool = False
) -> list[list[Result]]:
    """Run the evaluations of a sweep that are not done yet.

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
    executor = EXECUTORS[config.executor](config.worker_options)
    return drive(groups, executor, partial(plan_of, config), kl=config.kl, quiet=quiet)


def plan_of(config: SweepConfig, groups: Sequence[Group], left: Sequence[Sequence[Unit]]) -> str:
    """Describe in words what a sweep will do."""
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
        repeated = {r.config.press_name for r in shared if r.press and r.press.needs.reconstruction}
        apart = {c.config.press_name for c in group.runs if not shares_reading(c)}
        lines.append(f"  one prefill of a context for {len(shared)} runs")
        if repeated:
            lines.append(f"  and one reconstruction of it for: {', '.join(sorted(repeated))}")
        if apart:
            lines.append(f"  a prefill of their own for: {', '.join(sorted(apart))}")
    if config.executor != "serial":
        lines.append(f"{config.workers} workers ({config.executor})")
    return "\n".join(lines)


def load_sweep(path: str | None, options: Mapping[str, object]) -> SweepConfig:
    """Read a sweep's config from a YAML file, which given options override.

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
    return replace(SweepConfig(), **given, options={k: v for k, v in values.items() if k in known})


def _distinct(names: Sequence[str], same: Callable[[str], str]) -> list[str]:
    """Remove names that mean the same as an earlier one."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(same(name), name)
    return list(found.values())


def _same_part(dataset: str) -> str:
    name, _, part = dataset.partition(":")
    return f"{same_data(name)}:{part}"


def _has_ratio(press: BasePress) -> bool:
    try:
        return press.with_ratio(0.5) != press.with_ratio(0.25)
    except CachepressError:
        return False
