"""Base classes of benchmarks: how rows are loaded, normalised and judged."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.prompts import read_prompts
from cachepress.evaluation.tasks.fits import Fits
from cachepress.generation.prompt import END, MIDDLE
from cachepress.hf.types import PreTrainedTokenizerBase

Metric = Callable[[str, Sequence[str], Sequence[str]], float]
"""``(prediction, answers, choices)`` -> score from 0 to 1; choices are all classes, where there
are some."""
Loader = Callable[[EvaluationConfig, PreTrainedTokenizerBase], pd.DataFrame]
RowCheck = Callable[[Sequence[Mapping[str, object]]], None]
"""Checks the rows of a context that was just generated, and may refuse it."""

UNSCORED = "unscored"
"""The metric of rows whose answers are not public."""
PERPLEXITY = "perplexity"
"""The metric of rows whose answer is a text that the model is made to say."""
DEFAULT_LIMIT = 50
"""Tokens of an answer, where the data do not say."""
MOST_GENERATED = 10**8
"""Most tokens of all contexts of a generated data set."""
REQUIRED = ("context", "question", "answer")
OPTIONAL = {
    "answer_prefix": "",
    "max_new_tokens": DEFAULT_LIMIT,
    "task": None,
    "metric": "string_match",
    "choices": None,
    "length": None,
    "depth": None,
    "chat": None,
    "truncation": None,
    "separator": "",
}
COLUMNS = (*REQUIRED, *OPTIONAL)
DIGITS = 12
BEYOND = 10**DIGITS
"""More tokens than this are not told apart."""


@dataclass(frozen=True)
class Size:
    """Size of a data set, known before it is generated.

    Attributes:
        longest: tokens that the longest context has at least.
        total: tokens of all contexts together.
        beside: tokens at least of a question about it and of the room for its answer.
        shortest: tokens that every context has at least.
    """

    longest: int
    total: int
    beside: int
    shortest: int


@dataclass(frozen=True)
class Report:
    """Number that a benchmark reports of answers beside their score.

    Attributes:
        metric: scores each answer.
        weight: what an answer counts in the mean, by its accepted texts; None for the same for all.
    """

    metric: Metric
    weight: Callable[[Sequence[str]], float] | None = None


@dataclass(frozen=True)
class Task:
    """Benchmark: its name, loader, parts and metrics.

    Attributes:
        name: what ``--dataset`` says.
        about: one line, with the paper.
        load: gives the rows, as ``normalise`` does.
        parts: what ``--data-dir`` may be; empty where anything or nothing goes.
        metrics: what judges its rows, by the name in their column "metric".
        reports: by the name of such a metric, what else is reported of the rows that it judges.
        truncation: where its contexts are cut if they are too long: "middle" or "end".
        takes_prompts: whether its prompts can be the user's own; not where they stand in its data.
        fits: what those of them need that do not take any answer.
        official: the metric of each of its tasks, by the task's name.
        size: how much it will generate, for data that is not there yet.
        load_checked: gives the same rows as ``load``, and checks those of each context as soon as
            it is generated.
        submit: writes a table of predictions into a folder, as whoever judges them wants it.
    """

    name: str
    about: str
    load: Loader
    parts: Sequence[str] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    reports: Mapping[str, Mapping[str, Report]] = field(default_factory=dict)
    truncation: str = END
    takes_prompts: bool = False
    fits: Mapping[str, Fits] = field(default_factory=dict)
    official: Mapping[str, str] = field(default_factory=dict)
    size: Callable[[EvaluationConfig], Size] | None = None
    load_checked: (
        Callable[[EvaluationConfig, PreTrainedTokenizerBase, RowCheck], pd.DataFrame] | None
    ) = None
    submit: Callable[[pd.DataFrame, Path], object] | None = None

    def table(
        self,
        config: EvaluationConfig,
        tokenizer: PreTrainedTokenizerBase,
        check: RowCheck | None = None,
    ) -> pd.DataFrame:
        """Load the rows of the part that a config names.

        Args:
            config: names the part.
            tokenizer: the model's.
            check: checks the rows of each context as soon as it is generated.

        Raises:
            CachepressError: if there is no such part, or its rows are not to be had.
        """
        if self.parts and config.data_dir not in self.parts:
            raise CachepressError(
                f"{self.name}: got data_dir={config.data_dir!r}, wanted one of "
                f"{', '.join(self.parts)}"
            )
        if config.prompts is not None and not self.takes_prompts:
            raise CachepressError(
                f"{self.name} has its prompts in its data: leave --prompts {config.prompts} out"
            )
        if check is None or self.load_checked is None:
            table = self.load(config, tokenizer)
        else:
            table = self.load_checked(config, tokenizer, check)
        if config.prompts is not None:
            table = read_prompts(config.prompts).put_into(table)
        ways = [self.truncation if way is None else way for way in table["truncation"]]
        return table.assign(truncation=ways)


@dataclass(frozen=True)
class Part:
    """Prompt and metric of one part of a benchmark.

    Attributes:
        introduction: stands before the text.
        ask: what is asked after it.
        prefix: how the answer begins.
        max_new_tokens: most tokens of the answer.
        metric: name of what judges it.
    """

    introduction: str
    ask: str
    prefix: str
    max_new_tokens: int
    metric: str


def normalise(table: pd.DataFrame, task: str, origin: str) -> pd.DataFrame:
    """Check a table, and bring it to the columns of a data set, with lists of answers and choices.

    Args:
        table: at least the columns ``REQUIRED``.
        task: the task of rows that name none.
        origin: where the rows come from, for errors.

    Raises:
        CachepressError: if a row has no context, no answer, or a limit that is not a number.
    """
    table = table.reset_index(drop=True).copy()
    for name, default in OPTIONAL.items():
        if name not in table.columns:
            table[name] = default
    table["question"] = table["question"].fillna("").astype(str)
    table["answer_prefix"] = table["answer_prefix"].fillna("").astype(str)
    table["task"] = table["task"].fillna(task)
    table["metric"] = table["metric"].fillna(OPTIONAL["metric"])
    table["max_new_tokens"] = [_limit(value) for value in table["max_new_tokens"]]
    for number, context in enumerate(table["context"]):
        if not isinstance(context, str) or not context.strip():
            raise CachepressError(f"{origin}, row {number}: the context is empty")
    answers = [_texts(value) for value in table["answer"]]
    rows = zip(answers, table["max_new_tokens"], table["metric"], strict=True)
    for number, (answer, limit, metric) in enumerate(rows):
        if not answer and metric != UNSCORED:
            raise CachepressError(f"{origin}, row {number}: the answer is empty")
        digits = str(limit)
        if not digits.isdecimal() or not 1 <= whole_number(digits) < BEYOND:
            raise CachepressError(f"{origin}, row {number}: max_new_tokens is {limit!r}")
    table["answer"] = pd.Series(answers, dtype=object)
    table["choices"] = pd.Series([_texts(value) for value in table["choices"]], dtype=object)
    table["max_new_tokens"] = table["max_new_tokens"].astype(int)
    for name, known in _CHOICES.items():
        table[name] = _choices(list(table[name]), known, f"{origin}: {name}")
    table["separator"] = table["separator"].fillna("").astype(str)
    return table.loc[:, list(COLUMNS)]


_CHOICES: dict[str, dict[str, object]] = {
    "chat": {"true": True, "yes": True, "false": False, "no": False},
    "truncation": {MIDDLE: MIDDLE, END: END},
}


def _choices(values: Sequence[object], known: Mapping[str, object], origin: str) -> pd.Series:
    """Convert a column of named options; None for empty values."""
    found = []
    for number, value in enumerate(values):
        empty = value is None or value != value or value == ""
        name = str(value).lower()
        if not empty and name not in known:
            raise CachepressError(
                f"{origin} of row {number} is {value!r}, wanted one of {', '.join(known)}"
            )
        found.append(None if empty else known[name])
    return pd.Series(found, dtype=object)


def whole_number(digits: str) -> int:
    """Parse decimal digits to a number, ``BEYOND`` for one that is larger."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= DIGITS else BEYOND


def _limit(value: object) -> object:
    """Convert a number of tokens, the default for an empty cell, which makes a column of floats."""
    if value in ("", None) or value != value:
        return OPTIONAL["max_new_tokens"]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _texts(value: object) -> list[str]:
    if value is None or (isinstance(value, float) and value != value):
        return []
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [str(item) for item in value]
    return [str(value)] if str(value) else []
