"""Result folders: what each of them says, checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.predictions import read_predictions
from cachepress.evaluation.run import CONFIG, METRICS, PREDICTIONS
from cachepress.evaluation.statistics import Estimate
from cachepress.limits import said
from cachepress.structured import parse_json, read_mapping

COLUMNS = ("sample_id", "question", "answer", "context_id", "predicted_answer")
TEXTS = ("question", "answer_prefix", "task", "metric", "context_id", "predicted_answer")
LISTS = ("answer", "choices")
NUMBERS = ("score", "kl", "length", "depth")
_SHOWN = 160
"""Characters of what is wrong in an error."""


@dataclass(frozen=True, eq=False)
class SavedRun:
    """One finished run: a press at a ratio, on a data set, with a model.

    Attributes:
        folder: name of its folder.
        config: every setting and version.
        press: short name of the press.
        spelling: full spelling of the press.
        ratio: nominal ratio.
        query_aware: whether the press saw the question.
        metrics: names of the metrics.
        score: mean score; None if nothing was scored.
        tasks: the same for each task.
        reported: for each task, what its benchmark reports beside the score, by name.
        kl: divergence from the answers without a press; None if not measured.
        perplexity: of the wanted answers; None if not measured.
        achieved: fraction of pairs that are gone, measured.
        bytes_before: bytes that an uncompressed cache of the text holds.
        bytes_after: bytes that the compressed one has allocated.
        context_tokens: tokens of a context.
        cut_contexts: contexts that were cut, as they were too long; None if that is not known.
        cut_tokens: tokens of them that are gone.
        prefill_seconds: seconds of reading a context, compression included.
        press_seconds: the part of it that the press added; None if not measured.
        speed: decoded tokens per second, the median; None if not measured.
        speed_low: its first quartile; None if not known.
        speed_high: its third quartile.
        peak_bytes: most memory in use; None if not measured.
        machine: what it ran on.
        predictions: a row for each sample, by sample id.
    """

    folder: str
    config: Mapping[str, object]
    press: str
    spelling: str
    ratio: float
    query_aware: bool
    metrics: list[str]
    score: Estimate | None
    tasks: Mapping[str, Estimate | None]
    reported: Mapping[str, Mapping[str, Estimate | None]]
    kl: Estimate | None
    perplexity: Estimate | None
    achieved: float
    bytes_before: float
    bytes_after: float
    context_tokens: float
    cut_contexts: float | None
    cut_tokens: float | None
    prefill_seconds: float
    press_seconds: float | None
    speed: float | None
    speed_low: float | None
    speed_high: float | None
    peak_bytes: float | None
    machine: str
    predictions: pd.DataFrame


def read_runs(folder: Path) -> tuple[list[SavedRun], list[str]]:
    """Every finished run of a folder of results, and the names of those that are not finished.

    Raises:
        CachepressError: if the folder or one of the files is damaged or foreign, or if no run is
            finished.
    """
    if not folder.is_dir():
        raise CachepressError(f"{folder} is not a folder: wanted one with result folders in it")
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    runs = [read_run(path) for path in found if (path / METRICS).exists()]
    unfinished = [path.name for path in found if not (path / METRICS).exists()]
    if not runs:
        raise CachepressError(
            f"{folder} has no finished results: run cachepress evaluate --output-dir {folder} first"
        )
    return runs, unfinished


def read_run(folder: Path) -> SavedRun:
    """What one result folder says.

    Raises:
        CachepressError: if one of its files is damaged or foreign.
    """
    metrics = _Fields(folder / METRICS, read_mapping(folder / METRICS))
    config = _Fields(folder / CONFIG, read_mapping(folder / CONFIG))
    spelling = config.text("press")
    tasks = metrics.mapping("tasks")
    return SavedRun(
        folder=folder.name,
        config=config.values,
        press=config.text("press_name", spelling),
        spelling=spelling,
        ratio=config.number("compression_ratio"),
        query_aware=metrics.flag("query_aware"),
        metrics=metrics.names("metrics"),
        score=metrics.estimate("score"),
        tasks={name: tasks.estimate(name) for name in tasks.values},
        reported=_reported(metrics),
        kl=metrics.estimate("kl"),
        perplexity=metrics.estimate("perplexity"),
        achieved=metrics.number("compression_ratio"),
        bytes_before=metrics.number("cache_bytes_before"),
        bytes_after=metrics.number("cache_bytes_after"),
        context_tokens=metrics.number("context_tokens"),
        cut_contexts=metrics.number_or_none("cut_contexts"),
        cut_tokens=metrics.number_or_none("cut_tokens"),
        prefill_seconds=metrics.number("prefill_seconds"),
        press_seconds=metrics.number_or_none("press_seconds"),
        speed=metrics.number_or_none("decode_tokens_per_second"),
        speed_low=metrics.number_or_none("decode_tokens_per_second_low"),
        speed_high=metrics.number_or_none("decode_tokens_per_second_high"),
        peak_bytes=metrics.number_or_none("peak_memory_bytes"),
        machine=metrics.text("machine", ""),
        predictions=_predictions(folder / PREDICTIONS),
    )


def _reported(metrics: "_Fields") -> dict[str, dict[str, Estimate | None]]:
    """What is reported beside the scores; the oldest results do not have it."""
    if "reported" not in metrics.values:
        return {}
    tasks = metrics.mapping("reported")
    parts = {task: tasks.mapping(task) for task in tasks.values}
    return {task: {n: part.estimate(n) for n in part.values} for task, part in parts.items()}


@dataclass(frozen=True)
class _Fields:
    """The fields of a file, each checked when it is read."""

    path: Path
    values: Mapping[str, object]

    def number(self, name: str) -> float:
        value = self.number_or_none(name)
        if value is None:
            raise self._wrong(name, "a number")
        return value

    def number_or_none(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def names(self, name: str) -> list[str]:
        value = self.values.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list of names")
        return [str(item) for item in value]

    def mapping(self, name: str) -> "_Fields":
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "a mapping")
        return _Fields(self.path, value)

    def estimate(self, name: str) -> Estimate | None:
        if self.values.get(name) is None:
            return None
        part = self.mapping(name)
        ends = (part.number_or_none("low"), part.number_or_none("high"))
        low, high = (math.nan if end is None else end for end in ends)
        samples, contexts = int(part.number("samples")), int(part.number("contexts"))
        return Estimate(part.number("mean"), low, high, samples, contexts)

    def _wrong(self, name: str, wanted: str) -> CachepressError:
        got = "nothing" if name not in self.values else repr(self.values[name])
        return CachepressError(f"{self.path}: {name} is {said(got, _SHOWN)}, wanted {wanted}")


def _predictions(path: Path) -> pd.DataFrame:
    """A row for each sample: texts, lists, and numbers with NaN where there is none."""
    try:
        table = read_predictions(path)
    except OSError as error:
        raise CachepressError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CachepressError(f"{path} is damaged: {said(error, _SHOWN)}") from error
    for name in COLUMNS:
        if name not in table:
            raise CachepressError(f"{path} is no file of ours: it has no column {name!r}")
    if table["sample_id"].duplicated().any():
        raise CachepressError(f"{path} is damaged: two rows have the same sample_id")
    try:
        columns = {name: _column(table, name) for name in (*TEXTS, *LISTS, *NUMBERS)}
    except ValueError as error:
        raise CachepressError(f"{path} is damaged: {said(error, _SHOWN)}") from error
    return pd.DataFrame(columns).set_index(pd.Index(table["sample_id"], name="sample_id"))


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    cells = list(table[name]) if name in table else [""] * len(table)
    if name in NUMBERS:
        return pd.Series([float(cell) if cell else math.nan for cell in cells], dtype=float)
    # A column of texts of its own kind would not take half of a surrogate pair.
    return pd.Series([_texts(cell) for cell in cells] if name in LISTS else cells, dtype=object)


def _texts(cell: str) -> list[str]:
    """A JSON list, or one text."""
    value = parse_json(cell) if cell else []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
