"""One evaluation and its folder of results: records, keys of answers, and files written.

Nothing is computed here, see ``cachepress.evaluation.answering``.
"""

import hashlib
import json
import logging
import platform
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout

import cachepress
from cachepress.artefacts.digests import file_digests
from cachepress.errors import CachepressError
from cachepress.evaluation.config import CONFIG, EvaluationConfig
from cachepress.evaluation.predictions import PREDICTIONS, write_predictions
from cachepress.evaluation.records import RECORDS, SCHEMA, Answer, Record, Records, write_atomically
from cachepress.evaluation.registry import find_dataset
from cachepress.evaluation.results import METRICS, Metrics, metrics_of, predictions_of, score
from cachepress.evaluation.samples import Context, Sample
from cachepress.hf.types import TRANSFORMERS_VERSION
from cachepress.press import with_inner
from cachepress.presses import BasePress
from cachepress.structured import read_mapping

logger = logging.getLogger(__name__)
LOCK = ".lock"
SUBMISSION = "submission"
"""Folder for what a benchmark with private answers wants."""
OTHER_FILES = 256
"""Files that are open besides the locks: weights, libraries, pipes to workers."""


class Run:
    """One evaluation, of a press at a ratio on a data set with a model, and its folder.

    Args:
        config: what is evaluated.
        optional: whether it may be left out where the press does not fit the model.
    """

    def __init__(self, config: EvaluationConfig, optional: bool = False) -> None:
        self.config, self.folder = config, config.get_results_dir()
        self.optional = optional
        self.digests: dict[str, str] = {}
        self._identity: str | None = None
        self._keys: dict[tuple[Context, Sample], str] = {}
        self._records: Records | None = None
        self._locks = ExitStack()
        self._is_locked = False
        self._made: list[Path] = []

    @cached_property
    def press(self) -> BasePress | None:
        """The press at its ratio; None for no press."""
        return self.config.make_press()

    @property
    def label(self) -> str:
        """The press and its ratio, in words."""
        return f"{self.config.press_name} at {self.config.ratio}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder of results, so that two processes do not write into it.

        A folder that is not there yet is made when there is something to write, and is gone again
        where a run ends before its first answer.
        """
        with ExitStack() as self._locks:
            try:
                if self.folder.exists():
                    self._lock()
                yield
            except BaseException:
                self._leave_nothing()
                raise
            finally:
                self._is_locked = False

    def _lock(self) -> None:
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._locks.enter_context(lock_folder(self.folder))
        self._is_locked = True
        if not self.config.overwrite:
            self._records = Records(self.folder / RECORDS)

    def _leave_nothing(self) -> None:
        """Remove the folders that this run made, unless they hold something by now."""
        if self._done or not self._made:
            return
        for name in (CONFIG, RECORDS, LOCK):
            with suppress(OSError):
                (self.folder / name).unlink()
        for path in self._made:
            with suppress(OSError):
                path.rmdir()

    def check_folder(self) -> None:
        """Raise CachepressError if the folder has results of other options.

        Raises:
            CachepressError: if the folder has the results of another config.
        """
        there = {} if self.config.overwrite else self._saved_config()
        name = self.config.difference(there) if there else None
        if name is not None:
            raise CachepressError(
                f"{self.folder / CONFIG} has {name}={there.get(name)!r} but this run has "
                f"{self.config.identity()[name]!r}: use another --output-dir, or --overwrite to "
                "start over"
            )

    def identify(self, model: Mapping[str, str], name: str) -> None:
        """Set the digests of model, tokenizer and learned files, which keys of answers are made of.

        Args:
            model: digests of the model, by part.
            name: what the model is called where it is loaded.
        """
        self.digests = {**model, **learned_digests(self.press, name)}
        values = {**self.config.identity(), "digests": self.digests, "schema": SCHEMA}
        self._identity = json.dumps(values, sort_keys=True)
        self._keys.clear()

    def begin(self) -> None:
        """Open the records and write the options; ``overwrite`` removes earlier results."""
        if not self._is_locked:
            self._lock()
        if self._records is None:
            for name in (RECORDS, PREDICTIONS, METRICS):
                (self.folder / name).unlink(missing_ok=True)
            self._records = Records(self.folder / RECORDS)
        if self._saved_config().get("digests", self.digests) != self.digests:
            # What they show was answered by other weights or artefacts.
            for name in (PREDICTIONS, METRICS):
                (self.folder / name).unlink(missing_ok=True)
        self.save_config()

    def peek(self) -> None:
        """Read the records without locking the folder."""
        if (self.folder / RECORDS).exists() and not self.config.overwrite:
            self._records = Records(self.folder / RECORDS)

    def adopt(self, contexts: Sequence[Context]) -> None:
        """Take over the answers that version 0.1.0 recorded, whose keys knew no digests.

        This is done once: when options are saved now, the folder is no longer one of 0.1.0.
        """
        there = self._saved_config()
        if self._records is None or not there or "schema" in there:
            return
        if self.config.difference(there) is not None:
            return
        computed_by = {name: str(there.get(name)) for name in versions()}
        identity = json.dumps({k: v for k, v in there.items() if k not in _SAID}, sort_keys=True)
        found = {}
        for context in contexts:
            for sample in context.samples:
                record = self._done.get(_hash([identity, *self._asked(context, sample)]))
                key = self.key(context, sample)
                if record is not None and key not in self._done:
                    found[key] = replace(record, versions=computed_by, digests=self.digests)
        if found and self._is_locked:
            self._records.append(found)
        self._done.update(found)

    def computed_by(self, contexts: Sequence[Context]) -> list[str]:
        """Name the library versions, other than today's, that computed answers which are kept."""
        own, found = versions(), {}
        for context in contexts:
            for sample in context.samples:
                record = self._done.get(self.key(context, sample))
                theirs = own if record is None or record.versions is None else record.versions
                for name in own:
                    if theirs.get(name) != own[name]:
                        what = name.removesuffix("_version")
                        found[f"{what} {theirs.get(name)} (now {own[name]})"] = None
        return list(found)

    def key(self, context: Context, sample: Sample) -> str:
        """Hash everything that can change the answer to a sample."""
        assert self._identity is not None, "identify comes first"
        if (context, sample) not in self._keys:  # Texts are long, and keys are asked for often.
            asked = self._asked(context, sample)
            self._keys[context, sample] = _hash([self._identity, *asked])
        return self._keys[context, sample]

    def _asked(self, context: Context, sample: Sample) -> list[object]:
        """List what the model is asked: prompt, limits, and a text to score."""
        prompt = [context.text, sample.question, sample.answer_prefix, sample.max_new_tokens]
        forced = list(sample.answer) if sample.metric == "perplexity" else None
        departures = context.departures(self.config)
        return [prompt, forced, *([departures] if departures else [])]

    def has(self, context: Context, kl: bool = False) -> bool:
        """Tell whether every sample of a context is answered, with its divergence if asked for."""
        found = [self._done.get(self.key(context, sample)) for sample in context.samples]
        return all(record is not None and not (kl and record.kl is None) for record in found)

    def scores(self, context: Context) -> list[float]:
        """Score the answers to a context; NaN if no metric judges them."""
        return [
            score(
                self._done[self.key(context, sample)].predicted_answer,
                sample.answer,
                sample.choices,
                sample.metric,
            )
            for sample in context.samples
        ]

    def save(self, context: Context, answers: Mapping[int, Answer]) -> None:
        """Record answers by sample id; they are on disk when this returns."""
        assert self._records is not None
        self._records.append(
            {
                self.key(context, sample): Record(
                    **vars(answers[sample.sample_id]),
                    sample_id=sample.sample_id,
                    context_id=context.number,
                    digests=self.digests,
                    versions=versions(),
                )
                for sample in context.samples
            }
        )

    def predictions(self, table: pd.DataFrame, contexts: list[Context]) -> pd.DataFrame:
        """Join the data set, its answers and their scores, by sample id."""
        answers = {
            sample.sample_id: self._done[self.key(context, sample)]
            for context in contexts
            for sample in context.samples
        }
        return predictions_of(table, answers, self.config.ratio)

    def write_views(self, predictions: pd.DataFrame) -> Metrics:
        """Compute the metrics, and write predictions.csv, metrics.json and config.yaml."""
        sees = self.config.query_aware or self.config.sees_question
        metrics = metrics_of(predictions, sees)
        self.save_config()
        texts = predictions[[name for name in predictions if name not in _COSTS]].assign(
            **{name: predictions[name].map(as_json) for name in ("answer", "choices")}
        )
        write_predictions(self.folder / PREDICTIONS, texts.reset_index(names="sample_id"))
        submit = find_dataset(self.config.dataset).submit
        if submit is not None:
            submit(predictions, self.folder / SUBMISSION)
        metrics.write(self.folder)
        return metrics

    def save_config(self) -> None:
        """Write the options, digests and library versions to config.yaml."""
        place = {name: getattr(self.config, name) for name in ("device", "data_path", "metric")}
        said = {"press_name": self.config.press_name, "schema": SCHEMA, "digests": self.digests}
        values = {**self.config.identity(), **said, **place, **versions()}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        write_atomically(self.folder / CONFIG, text)

    def _saved_config(self) -> dict[str, object]:
        """Read the options of the results in the folder; empty if there are none."""
        path = self.folder / CONFIG
        return {} if self.config.overwrite or not path.exists() else read_mapping(path)

    @property
    def _done(self) -> dict[str, Record]:
        return {} if self._records is None else self._records.done


_SAID = ("press_name", "device", "data_path")
"""What saved options of 0.1.0 say besides the fields that its keys were made of."""
_COSTS = {f.name for f in fields(Answer)} - {"predicted_answer", "kl"}
"""Columns that differ between two runs with the same answers; predictions.csv leaves them out."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder of results.

    Raises:
        CachepressError: if another process holds it.
    """
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise CachepressError(
            f"another run is writing to {folder}: wait for it, or use another --output-dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def allow_open_files(n: int) -> None:
    """Raise the limit of open files: each folder of results holds one open, as a lock.

    Raises:
        CachepressError: if the system allows fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise CachepressError(
            f"got {n} evaluations, and each holds a file open, but only {hard} are allowed: sweep "
            f"in parts, or raise the limit (ulimit -n {wanted})"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def versions() -> dict[str, str]:
    """Return the versions of cachepress, torch, transformers and Python."""
    return {
        "cachepress_version": cachepress.__version__,
        "torch_version": str(torch.__version__),
        "transformers_version": TRANSFORMERS_VERSION,
        "python_version": platform.python_version(),
    }


def learned_digests(press: BasePress | None, model: str) -> dict[str, str]:
    """Hash the artefacts that a press and its inner presses read for a model."""
    found = {}
    for place, one in enumerate(() if press is None else with_inner(press)):
        for kind in one.learned.values():
            try:
                digest = file_digests(one.files(model)[kind])
            except (CachepressError, OSError):
                digest = "missing"  # The press says so when it meets the model.
            found[f"{place} {kind}"] = str(digest)
    return found


def say_versions(runs: Sequence[Run], contexts: Sequence[Context]) -> None:
    """Log which answers were computed by other versions; they are kept."""
    found: dict[str, None] = {}
    for run in runs:
        found |= dict.fromkeys(run.computed_by(contexts))
    if found:
        logger.warning(
            "answers that are there were computed by %s, and are kept: --overwrite computes "
            "them anew",
            ", ".join(found),
        )


def _hash(values: list[object]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def as_json(texts: list[str]) -> str:
    """Encode texts as JSON for predictions.csv; a lone surrogate is escaped."""
    text = json.dumps(texts, ensure_ascii=False)
    return text.encode(errors="backslashreplace").decode()
