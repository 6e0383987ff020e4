"""Loads data sets as contexts with their questions, and applies the options of prompts."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.predictions import OWN_METRIC
from cachepress.evaluation.registry import UNJUDGED, check_metric, find_dataset
from cachepress.evaluation.room import check_size
from cachepress.evaluation.tasks.base import PERPLEXITY, RowCheck, Task, normalise
from cachepress.generation.prompt import END, PromptOptions, prompt_within
from cachepress.hf.types import PreTrainedTokenizerBase
from cachepress.models.loading import positions_of

logger = logging.getLogger(__name__)
_OF_CONTEXT = ("context", "chat", "truncation", "separator", "suffix")
"""What the rows of one context have in common."""
PROMPTING = ("chat", "truncation", "separator", "suffix")
"""Columns that say how a row is asked, which is no result."""


@dataclass(frozen=True)
class Sample:
    """Question about a context, with its accepted answers and metric.

    Attributes:
        sample_id: its number in the data set.
        question: what is asked.
        answer_prefix: how the answer begins.
        max_new_tokens: most tokens of the answer.
        answer: accepted texts.
        choices: all classes, where the metric needs them.
        metric: name of what judges the answer.
    """

    sample_id: int
    question: str
    answer_prefix: str
    max_new_tokens: int
    answer: tuple[str, ...]
    choices: tuple[str, ...]
    metric: str


@dataclass(frozen=True)
class Context:
    """Context, with all questions about it.

    Attributes:
        number: its place in the data set.
        text: the text.
        samples: the questions.
        chat: whether they are put into the model's chat template.
        truncation: where the text is cut if it is too long, unless a config says it.
        separator: what then stands there.
        suffix: the question that the text ends with, which a cut spares.
    """

    number: int
    text: str
    samples: tuple[Sample, ...]
    chat: bool = True
    truncation: str = END
    separator: str = ""
    suffix: str = ""

    def prompt_options(self, config: EvaluationConfig) -> PromptOptions:
        """Return the options by which the context and its questions are tokenised."""
        return PromptOptions(
            questions=[sample.question for sample in self.samples],
            answer_prefix=[sample.answer_prefix for sample in self.samples],
            max_new_tokens=[sample.max_new_tokens for sample in self.samples],
            forced=[s.answer[0] if s.metric == PERPLEXITY else "" for s in self.samples],
            max_context_length=config.max_context_length,
            truncation=self.truncation if config.truncation is True else config.truncation,
            separator=self.separator,
            suffix=self.suffix,
            beyond_trained_length=config.beyond_trained_length,
            chat=self.chat,
        )

    def departures(self, config: EvaluationConfig) -> dict[str, object]:
        """Return the prompt options that change a prompt of version 0.1.0, which did not have them.

        A record's key has only these, so that answers from before are still found.
        """
        options = self.prompt_options(config)
        found: dict[str, object] = {}
        if options.chat == any(sample.metric == PERPLEXITY for sample in self.samples):
            found["chat"] = options.chat
        if options.truncation:
            found |= {"truncation": options.truncation} if options.truncation != END else {}
            names = ("separator", "suffix")
            found |= {name: text for name in names if (text := getattr(options, name))}
        return found

    def one_by_one(self) -> list["Context"]:
        """Split into one context for each question."""
        return [replace(self, samples=(sample,)) for sample in self.samples]


def load_table(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Load the rows that a config evaluates, by sample id, with the number of their context.

    Raises:
        CachepressError: if there is no such data set, it is damaged, it cannot fit, or a metric
            does not fit its answers.
    """
    task = find_dataset(config.dataset)
    check_size(task, config)
    table = task.table(config, tokenizer, _length_check(task, config, tokenizer))
    table = judged_by(table.assign(**{OWN_METRIC: table["metric"]}), config.metric)
    if config.metric is not None and set(table["metric"]) <= {*UNJUDGED}:
        logger.warning("%s: no metric judges it, %s neither", config.dataset, config.metric)
    check_metrics(table, config.dataset)
    if config.fraction < 1:
        contexts = pd.Series(list(dict.fromkeys(table["context"])))
        count = max(1, round(len(contexts) * config.fraction))
        chosen = list(contexts.sample(count, random_state=config.seed))
        table = table.loc[table["context"].isin(chosen)]
    return _asked(table, config)


def _length_check(
    task: Task, config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase
) -> RowCheck | None:
    """Make a check that refuses a context that is too long before the others are generated."""
    if task.load_checked is None or config.fraction < 1:
        return None  # Of a fraction, it may be none of those that are read.
    positions, shown = positions_of(config.model, config.loading), 0

    def check(rows: Sequence[Mapping[str, object]]) -> None:
        nonlocal shown
        table = normalise(pd.DataFrame(rows), task.name, task.name)
        table = table.assign(truncation=task.truncation)
        for context in contexts_of(_asked(table, config)):
            try:
                options = context.prompt_options(config)
                prompt_within(tokenizer, positions, context.text, options)
            except CachepressError as error:
                number = shown + context.samples[0].sample_id
                raise CachepressError(f"sample {number}: {error}") from error
        shown += len(rows)

    return check


def _asked(table: pd.DataFrame, config: EvaluationConfig) -> pd.DataFrame:
    """Apply a config's prompt options to a table, and number the contexts."""
    if config.max_new_tokens is not None:
        table = table.assign(max_new_tokens=config.max_new_tokens)
    table = table.assign(suffix="", chat=_chat(table, config))
    if config.query_aware:
        moved = {"context": table["context"] + table["question"], "suffix": table["question"]}
        table = table.assign(**moved, question="")
    same = table.groupby(list(_OF_CONTEXT), sort=False, dropna=False)
    return table.assign(context_id=same.ngroup())


def _chat(table: pd.DataFrame, config: EvaluationConfig) -> list[bool]:
    """Decide for each row whether it is put into the chat template."""
    going_on = [metric == PERPLEXITY for metric in table["metric"]]
    if config.chat is None:
        return [
            own is not False and not other
            for own, other in zip(table["chat"], going_on, strict=True)
        ]
    if config.chat and any(going_on):
        raise CachepressError(
            f"{config.dataset}: a text that goes on is in no chat template: leave --chat out"
        )
    return [config.chat] * len(table)


def judged_by(table: pd.DataFrame, metric: str | None) -> pd.DataFrame:
    """Set the metric of all samples that have one; None sets each sample's own."""
    own = table[OWN_METRIC]
    chosen = own if metric is None else own.where(own.isin(UNJUDGED), metric)
    return table.assign(metric=chosen)


def check_metrics(table: pd.DataFrame, origin: str) -> None:
    """Raise CachepressError if a metric does not fit the answers of a sample.

    Raises:
        CachepressError: if there is one, naming the sample.
    """
    tried: set[str] = set()
    columns = (table.index, table["metric"], table["answer"], table["choices"])
    for sample_id, metric, answer, choices in zip(*columns, strict=True):
        if metric in UNJUDGED:
            continue
        try:
            check_metric(metric, answer, choices, trial=metric not in tried)
        except CachepressError as error:
            raise CachepressError(f"{origin}, sample {sample_id}: {error}") from error
        tried.add(metric)


def contexts_of(table: pd.DataFrame) -> list[Context]:
    """Group the rows of a table into contexts, in its order."""
    return [_context(group) for _, group in table.groupby("context_id", sort=False)]


def _context(group: pd.DataFrame) -> Context:
    """Make a context of rows that share it."""
    first = group.iloc[0]
    return Context(
        number=int(first["context_id"]),
        text=str(first["context"]),
        samples=_samples(group),
        chat=bool(first["chat"]),
        truncation=str(first["truncation"]),
        separator=str(first["separator"]),
        suffix=str(first["suffix"]),
    )


def _samples(group: pd.DataFrame) -> tuple[Sample, ...]:
    names = ("question", "answer_prefix", "max_new_tokens", "answer", "choices", "metric")
    columns = (group.index, *(group[name] for name in names))
    return tuple(
        Sample(int(i), question, prefix, int(limit), tuple(answer), tuple(choices), metric)
        for i, question, prefix, limit, answer, choices, metric in zip(*columns, strict=True)
    )
