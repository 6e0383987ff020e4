"""One press at one ratio on one data set with one model: its folder, and what is done of it."""

import hashlib
import json
import platform
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
import transformers
import yaml
from filelock import FileLock, Timeout

import cachepress
from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.predictions import write_predictions
from cachepress.evaluation.records import Records, write_atomically
from cachepress.evaluation.registry import find_dataset
from cachepress.evaluation.samples import Context, Sample
from cachepress.evaluation.views import metrics_of, predictions_of, score
from cachepress.presses import BasePress

RECORDS, PREDICTIONS, METRICS, CONFIG = (
    "records.jsonl",
    "predictions.csv",
    "metrics.json",
    "config.yaml",
)
SUBMISSION = "submission"
"""Folder for what a benchmark with private answers wants."""
OTHER_FILES = 256
"""Files that are open besides the locks: weights, libraries, pipes to workers."""


@dataclass(frozen=True)
class Answer:
    """An answer to one sample, and what it cost.

    Attributes:
        predicted_answer: the text.
        decode_tokens: its tokens.
        context_tokens: tokens of the context, the chat template's part included.
        prompts: name and hash of the user's prompts; None for those here.
        cut_tokens: tokens of it that were cut; None in a record that does not say it.
        prefill_seconds: time of reading the context, compression included.
        press_seconds: time of it that the press added; None where it was not measured.
        step_seconds: median time of decoding one token of one sequence after the context; None
            where it was not measured.
        bytes_before: bytes of the cache just before rows were dropped.
        bytes_after: bytes after.
        rows_seen: rows that an uncompressed cache holds.
        rows_held: rows that are held.
        peak_memory_bytes: the most memory that the process had needed by then; None where others
            shared its reading.
        machine: what it ran on.
        kl: KL divergence in nats a token of what the model expects at each token of the
            uncompressed model's answer, from what the uncompressed model expects; None where it was
            not asked for.
        nll: negative log-likelihood in nats a token of the first accepted text; None where the
            metric does not ask for it.
    """

    predicted_answer: str
    decode_tokens: int
    context_tokens: int
    prefill_seconds: float
    press_seconds: float | None
    step_seconds: float | None
    bytes_before: int
    bytes_after: int
    rows_seen: int
    rows_held: int
    peak_memory_bytes: int | None
    machine: str
    kl: float | None = None
    nll: float | None = None
    cut_tokens: int | None = None
    prompts: str | None = None


class Cell:
    """One press at one ratio on one data set with one model.

    Args:
        config: what is evaluated.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config, self.folder = config, config.get_results_dir()
        self._identity = json.dumps({**config.identity(), **versions()}, sort_keys=True)
        self._records: Records | None = None

    @cached_property
    def press(self) -> BasePress | None:
        """The press at its ratio; None for no press."""
        return self.config.make_press()

    @property
    def label(self) -> str:
        """The press and its ratio, in words."""
        return f"{self.config.press_name} at {self.config.ratio}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder of results, so that two runs do not write into each other."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with holding(self.folder):
            if not self.config.overwrite:
                self._records = Records(self.folder / RECORDS)
            yield

    def check_folder(self) -> None:
        """Refuse to mix the results of two configs.

        Raises:
            CachepressError: if the folder has the results of another config.
        """
        path = self.folder / CONFIG
        if not path.exists() or self.config.overwrite:
            return
        there = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for name, value in self.config.identity().items():
            if there.get(name) != value:
                raise CachepressError(
                    f"{path} has {name}={there.get(name)!r} but this run has {value!r}: use "
                    "another --output-dir, or --overwrite to start over"
                )

    def begin(self) -> None:
        """Say what this run is; with ``overwrite``, forget what was there before."""
        if self._records is None:
            for name in (RECORDS, PREDICTIONS, METRICS):
                (self.folder / name).unlink(missing_ok=True)
            self._records = Records(self.folder / RECORDS)
        self.save_config()

    def peek(self) -> None:
        """Look at what is done, without holding the folder."""
        if (self.folder / RECORDS).exists() and not self.config.overwrite:
            self._records = Records(self.folder / RECORDS)

    def key(self, context: Context, sample: Sample) -> str:
        """A hash of everything that can change the answer to a sample."""
        prompt = [context.text, sample.question, sample.answer_prefix, sample.max_new_tokens]
        forced = list(sample.answer) if sample.metric == "perplexity" else None
        departures = context.departures(self.config)
        text = json.dumps([self._identity, prompt, forced, *([departures] if departures else [])])
        return hashlib.sha256(text.encode()).hexdigest()

    def has(self, context: Context, kl: bool = False) -> bool:
        """Whether every sample of a context is answered, with its divergence if that is asked."""
        found = [self._done.get(self.key(context, sample)) for sample in context.samples]
        return all(record is not None and not (kl and record["kl"] is None) for record in found)

    def scores(self, context: Context) -> list[float]:
        """Scores of the answers to a context; NaN where nothing judges them."""
        return [
            score(
                self._done[self.key(context, sample)]["predicted_answer"],
                sample.answer,
                sample.choices,
                sample.metric,
            )
            for sample in context.samples
        ]

    def save(self, context: Context, answers: Mapping[int, Answer]) -> None:
        """Write answers by sample id; they are on disk when this returns."""
        assert self._records is not None
        self._records.append(
            {
                self.key(context, sample): {
                    "sample_id": sample.sample_id,
                    "context_id": context.number,
                    **asdict(answers[sample.sample_id]),
                }
                for sample in context.samples
            }
        )

    def predictions(self, table: pd.DataFrame, contexts: list[Context]) -> pd.DataFrame:
        """What was predicted, by sample id, with scores."""
        records = {
            sample.sample_id: self._done[self.key(context, sample)]
            for context in contexts
            for sample in context.samples
        }
        return predictions_of(table, records, self.config.ratio)

    def write_views(self, predictions: pd.DataFrame) -> dict:
        """Write predictions.csv, metrics.json and config.yaml; the metrics."""
        metrics = metrics_of(predictions, self.config.query_aware or self.config.sees_question)
        self.save_config()
        texts = predictions[[name for name in predictions if name not in _COSTS]].assign(
            **{name: predictions[name].map(as_json) for name in ("answer", "choices")}
        )
        write_predictions(self.folder / PREDICTIONS, texts.reset_index(names="sample_id"))
        submit = find_dataset(self.config.dataset).submit
        if submit is not None:
            submit(predictions, self.folder / SUBMISSION)
        write_atomically(self.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
        return metrics

    def save_config(self) -> None:
        """Write what this run is, with the versions that computed it."""
        place = {name: getattr(self.config, name) for name in ("device", "data_path", "metric")}
        name = {"press_name": self.config.press_name}
        values = {**self.config.identity(), **name, **place, **versions()}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        write_atomically(self.folder / CONFIG, text)

    @property
    def _done(self) -> dict[str, dict]:
        return {} if self._records is None else self._records.done


_COSTS = tuple(
    name for name in Answer.__dataclass_fields__ if name not in ("predicted_answer", "kl")
)
"""Columns that differ between two runs with the same answers; predictions.csv leaves them out."""


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a folder of results.

    Raises:
        CachepressError: if another process holds it.
    """
    lock = FileLock(folder / ".lock", blocking=False)
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
    """Make room for so many open files, as one is held for each folder of results.

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
    """The versions of all that computes."""
    return {
        "cachepress_version": cachepress.__version__,
        "torch_version": str(torch.__version__),
        "transformers_version": transformers.__version__,
        "python_version": platform.python_version(),
    }


def as_json(texts: list[str]) -> str:
    """Texts as they stand in predictions.csv."""
    return json.dumps(texts, ensure_ascii=False)
