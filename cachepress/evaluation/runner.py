"""Drives evaluations, one run or many: answers what is not answered yet, and writes results.

Every answer is on disk as soon as it is there, and what is on disk is not computed again. What a
run is of and where its files lie is in ``cachepress.evaluation.run``, how contexts are answered in
``cachepress.evaluation.answering``, and by which processes in ``cachepress.evaluation.executors``.
"""

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import pandas as pd
from tqdm import tqdm

from cachepress.artefacts.digests import model_digests
from cachepress.artefacts.fingerprint import loaded_digests
from cachepress.artefacts.kept import model_name
from cachepress.deprecated import Renamed
from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.executors import Executor, Job, Loaded, Serial, Unit, WorkerOptions
from cachepress.evaluation.registry import find_dataset, find_metric
from cachepress.evaluation.results import Metrics
from cachepress.evaluation.run import Run, say_versions
from cachepress.evaluation.samples import Context, contexts_of, load_table
from cachepress.evaluation.statistics import Paired, paired
from cachepress.models.loading import load_tokenizer, resolve

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The result of one run, and how it differs from the run without a press.

    Attributes:
        run: which one.
        metrics: as they stand in metrics.json.
        paired: how it differs from no press on the same samples; None for no press itself.
    """

    run: Run
    metrics: Metrics
    paired: Paired | None


@dataclass
class Group:
    """Runs that read the same contexts with the same model.

    Attributes:
        runs: what is evaluated; the first one is without a press, if any is.
        table: the data set.
        contexts: what is read.
    """

    runs: list[Run]
    table: pd.DataFrame = field(init=False)
    contexts: list[Context] = field(init=False)

    @property
    def config(self) -> EvaluationConfig:
        """Options of the first run, of which all runs share those of model and data."""
        return self.runs[0].config

    def load(self, loaded: Loaded | None = None) -> None:
        """Load the data set, and compute the digests that answers depend on.

        Args:
            loaded: a model and its tokenizer; None for those that the config names.
        """
        config = self.config
        find_dataset(config.dataset)
        if config.metric is not None:
            find_metric(config.metric)
        tokenizer = loaded[1] if loaded else load_tokenizer(config.model, config.loading)
        self.table = load_table(config, tokenizer)
        self.contexts = contexts_of(self.table)
        if loaded is None:
            digests, name = model_digests(config.model, config.model_kwargs), resolve(config.model)
        else:
            digests, name = loaded_digests(*loaded), model_name(loaded[0])
        for run in self.runs:
            run.identify(digests, name)
            run.adopt(self.contexts)

    def units(self, kl: bool) -> Iterator[Unit]:
        """List the contexts that are not answered, each with the runs that lack its answers."""
        for context in self.contexts:
            left = [run for run in self.runs if not run.has(context, kl and _measures(run))]
            if left:
                yield Unit(context, tuple(run.config for run in left))

    def results(self) -> list[Result]:
        """Compute and write metrics and predictions of every run, whose answers are all there."""
        results: list[Result] = []
        base: pd.DataFrame | None = None
        for run in self.runs:
            predictions = run.predictions(self.table, self.contexts)
            metrics = run.write_views(predictions)
            base = predictions if base is None else base
            scored = any(not math.isnan(score) for score in base["score"])
            compares = run.press is not None and run is not self.runs[0] and scored
            results.append(Result(run, metrics, paired(predictions, base) if compares else None))
        return results


Plan = Callable[[Sequence[Group], Sequence[Sequence[Unit]]], str]
"""``(groups, what is left of each)`` -> what will be done, in words; nothing if empty."""


def drive(
    groups: Sequence[Group],
    executor: Executor,
    plan: Plan,
    *,
    kl: bool = False,
    quiet: bool = False,
    loaded: Loaded | None = None,
) -> list[list[Result]]:
    """Answer what is not answered yet, write the results, and return them.

    Args:
        groups: what is evaluated; a run that may be left out is where its press does not fit.
        executor: who answers.
        plan: says what will be done.
        kl: whether divergences are measured.
        quiet: no progress bar.
        loaded: a model and its tokenizer; None for those that each config names.

    Returns:
        The results of each group.

    Raises:
        CachepressError: for every input that cannot work, before any work; nothing that was
            computed is lost.
    """
    with ExitStack() as stack:
        for group in groups:
            for run in group.runs:
                stack.enter_context(run.locked())
                run.check_folder()
            group.load(loaded)
            say_versions(group.runs, group.contexts)
        stack.enter_context(executor)
        for group in groups:
            if any(True for _ in group.units(kl)):
                _check(group, executor)
        for run in (run for group in groups for run in group.runs):
            run.begin()
        left = [list(group.units(kl)) for group in groups]
        if told := plan(groups, left):
            logger.info("%s", told)
        _work(groups, [unit for part in left for unit in part], executor, quiet)
        return [group.results() for group in groups]


def _check(group: Group, executor: Executor) -> None:
    """Check presses and contexts; leave out optional runs whose press does not fit the model."""
    unfit = executor.check(Job([run.config for run in group.runs], group.contexts))
    for run in group.runs:
        reason = unfit.get(run.folder)
        if reason is not None and not run.optional:
            raise CachepressError(reason)
        if reason is not None:
            logger.warning("left out: %s: %s", run.label, reason)
    group.runs = [run for run in group.runs if run.folder not in unfit]


def _work(groups: Sequence[Group], units: Sequence[Unit], executor: Executor, quiet: bool) -> None:
    """Answer what is left, and write each context's answers as they come."""
    runs = {run.folder: run for group in groups for run in group.runs}
    total = sum(len(group.contexts) * len(group.runs) for group in groups)
    left = sum(len(unit.configs) for unit in units)
    contexts = [context for group in groups for context in group.contexts]
    alone = next(iter(runs.values())) if len(runs) == 1 else None
    done = [context for context in contexts if alone is not None and alone.has(context)]
    scores = [x for context in done if alone for x in alone.scores(context)]
    with tqdm(total=total, initial=total - left, unit="context", disable=quiet or not units) as bar:
        for unit, answered in executor.run(units):
            for folder, found in answered.found:
                runs[folder].save(unit.context, found)
            if answered.error is not None:
                raise answered.error
            if alone is not None:
                scores += alone.scores(unit.context)
                judged = [x for x in scores if not math.isnan(x)]
                if judged:
                    bar.set_postfix_str(f"score {statistics.fmean(judged):.3f}", refresh=False)
            bar.update(len(answered.found))


def _measures(run: Run) -> bool:
    """Tell whether a KL divergence can be measured: not under a press that acts while decoding."""
    return run.press is None or not run.press.schedule.decodes


class EvaluationRunner:
    """Evaluates one press at one ratio on one data set.

    Args:
        config: what to evaluate.
        model: a loaded model and tokenizer, to share between runs; None to load the config's.
        quiet: no progress bar.

    Attributes:
        run: what is evaluated, and its folder.
        results_dir: the folder.
    """

    cell = Renamed("run")

    def __init__(
        self, config: EvaluationConfig, model: Loaded | None = None, quiet: bool = False
    ) -> None:
        self.config, self._loaded, self._quiet = config, model, quiet
        self.run = Run(config)
        self.results_dir = self.run.folder
        self._executor = Serial(WorkerOptions(shares=False), model)

    def run_evaluation(self) -> dict[str, object]:
        """Run what is not done yet, and return the metrics as metrics.json has them."""
        return self.evaluate().to_json()

    def evaluate(self) -> Metrics:
        """Run what is not done yet, and return the metrics.

        Returns:
            The metrics.

        Raises:
            CachepressError: for every input that cannot work; nothing computed is lost.
        """
        ((result,),) = drive(
            [Group([self.run])], self._executor, _progress, quiet=self._quiet, loaded=self._loaded
        )
        return result.metrics


def _progress(groups: Sequence[Group], left: Sequence[Sequence[Unit]]) -> str:
    """Say how much of a single run is done already."""
    ((run,), total) = groups[0].runs, len(groups[0].contexts)
    done = total - len(left[0])
    if done == total:
        return f"already done: {run.folder} (--overwrite to do it again)"
    return f"resuming: {done} of {total} contexts are done" if done else ""
