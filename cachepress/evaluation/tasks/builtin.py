"""Built-in long-context tasks, generated for any length and any tokenizer.

Values hidden in a text of exactly so many tokens, and questions about them, in the spirit of RULER
(Hsieh et al., 2024, arXiv:2404.06654). Nothing is downloaded, and a seed always gives the same
table under the same version of Python.
"""

from collections.abc import Callable, Sequence
from random import Random

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.tasks import builtin_drafts as drafts
from cachepress.evaluation.tasks.base import (
    MOST_GENERATED,
    RowCheck,
    Size,
    Task,
    normalise,
    whole_number,
)
from cachepress.evaluation.tasks.builtin_drafts import Draft
from cachepress.evaluation.tasks.builtin_text import NOUNS
from cachepress.hf.types import PreTrainedTokenizerBase

COLUMNS = (
    "context",
    "question",
    "answer",
    "answer_prefix",
    "max_new_tokens",
    "task",
    "length",
    "depth",
)
MOST_QUESTIONS = len(NOUNS)
GOLDEN_RATIO = (5**0.5 - 1) / 2
FULL_ENOUGH = 0.99
LEAST_FULL = 0.95
CONTEXTS = 10
Count = Callable[[str], int]


TASKS: dict[str, Callable[[Random, float, int], Draft]] = {
    draft.__name__: draft
    for draft in (
        drafts.single_repeat,
        drafts.single_prose,
        drafts.multi_key,
        drafts.multi_value,
        drafts.multi_query,
        drafts.variable_tracking,
        drafts.common_words,
        drafts.frequent_words,
    )
}
"""Functions that draft a context, with its questions, from a source of randomness, a depth from 0
to 1 and a number of questions; tasks with a single question ignore that number."""
DEFAULT_TASKS = ("single_repeat", "single_prose", "multi_key", "multi_value", "multi_query")
"""Those that the built-in model solves for the most part at 1000 tokens."""
DEFAULT_LENGTH = 1000


def generate(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = DEFAULT_TASKS,
    length: int = 1000,
    contexts: int = CONTEXTS,
    questions: int = 4,
    seed: int = 0,
    check: RowCheck | None = None,
) -> pd.DataFrame:
    """Generate contexts of a given length with questions about them.

    Args:
        tokenizer: counts the tokens; contexts are cut by it.
        tasks: names out of ``TASKS``.
        length: most tokens of a context; it has at least 95 % of them.
        contexts: contexts of each task.
        questions: questions about each context, where the task has several.
        seed: a context depends on this, its task and its number, and on nothing that is asked for
            besides it.
        check: checks the rows of each context as soon as it is generated.

    Returns:
        A row for each question, with the columns ``COLUMNS``. Rows of one context follow each
        other. "answer" lists the strings that an answer has to contain; "length" is the number of
        tokens of the context; "depth" is the share of its characters before the needle, None if
        the answer is in several places.

    Raises:
        CachepressError: if a task is unknown, or a number is out of range.
    """
    _check(tasks, contexts, questions, length)
    count, rows = _counter(tokenizer), []
    for task in tasks:
        made = [_draft(task, number, questions, seed) for number in range(contexts)]
        if length < (least := max(count(draft.write(draft.least)) for draft in made)):
            what = f"{least} tokens for task {task!r} with questions={questions}"
            raise CachepressError(f"length: got {length}, wanted at least {what}")
        for draft in made:
            new = _rows(draft, _cut(draft, count, length), task, count)
            if check is not None:
                check(new)
            rows += new
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["depth"] = pd.Series([row["depth"] for row in rows], dtype=object)
    return table


def _counter(tokenizer: PreTrainedTokenizerBase) -> Count:
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _check(tasks: Sequence[str], contexts: int, questions: int, length: int) -> None:
    for task in [tasks] if isinstance(tasks, str) else tasks:
        if task not in TASKS:
            raise CachepressError(f"unknown task {task!r}: wanted one of {', '.join(TASKS)}")
    if isinstance(tasks, str) or not tasks:
        raise CachepressError(f"tasks: got {tasks!r}, wanted a list of names")
    if contexts < 1:
        raise CachepressError(f"contexts: got {contexts}, wanted at least 1")
    if not 1 <= questions <= MOST_QUESTIONS:
        raise CachepressError(f"questions: got {questions}, wanted 1 to {MOST_QUESTIONS}")
    if len(tasks) * contexts * length > MOST_GENERATED:
        raise CachepressError(
            f"length: got {length}, wanted at most {MOST_GENERATED // (len(tasks) * contexts)} for "
            f"{contexts} contexts of {len(tasks)} tasks"
        )


def _draft(task: str, number: int, questions: int, seed: int) -> Draft:
    # Multiples of the golden ratio spread evenly over 0 to 1, however many of them there are.
    depth = (number + 0.5) * GOLDEN_RATIO % 1
    return TASKS[task](Random(f"{seed}/{task}/{number}"), depth, questions)


def _cut(draft: Draft, count: Count, length: int) -> str:
    """Fill a draft's text with as much filler as fits a number of tokens, or almost."""
    words, beyond = draft.least, 4 * length
    text = draft.write(words)
    tokens = count(text)
    while beyond - words > 1 and tokens < FULL_ENOUGH * length:
        middle = (words + beyond) // 2
        tried = draft.write(middle)
        if (size := count(tried)) > length:
            beyond = middle
        else:
            words, text, tokens = middle, tried, size
    return text


def _rows(draft: Draft, context: str, task: str, count: Count) -> list[dict[str, object]]:
    tokens = count(context)
    rows = []
    for question in draft.questions:
        needle, depth = question.needle, None
        if needle is not None:
            depth = round(context.index(needle) / len(context), 4)
        values = (
            context,
            question.text,
            question.answer,
            question.prefix,
            _with_margin(count(question.rest)),
            task,
            tokens,
            depth,
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _with_margin(tokens: int) -> int:
    return tokens * 5 // 4 + 2


def _load(
    config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, check: RowCheck | None = None
) -> pd.DataFrame:
    tasks, length = _part(config.data_dir)
    table = generate(tokenizer, tasks=tasks, length=length, seed=config.seed, check=check)
    return normalise(table, task="builtin", origin="builtin")


def _part(data_dir: str | None) -> tuple[Sequence[str], int]:
    """Parse "1000", "multi_key", "multi_key-1000" or nothing to tasks and length."""
    task, dash, length = (data_dir or "").rpartition("-")
    if not (length.isascii() and length.isdecimal()):
        task, length = data_dir or "", str(DEFAULT_LENGTH)
    if (task or dash) and task not in TASKS:
        raise CachepressError(
            f"builtin: got data_dir={data_dir!r}, wanted a length, a task or task-length, such as "
            f"1000 or multi_key-1000; tasks are {', '.join(TASKS)}"
        )
    return [task] if task else DEFAULT_TASKS, whole_number(length)


def _size(config: EvaluationConfig) -> Size:
    tasks, length = _part(config.data_dir)
    asked = 1 + (config.max_new_tokens or _with_margin(1))
    least = int(LEAST_FULL * length)
    return Size(least, len(tasks) * CONTEXTS * length, asked, least)


BUILTIN = Task(
    "builtin", "generated retrieval and counting tasks", _load, size=_size, load_checked=_load
)
