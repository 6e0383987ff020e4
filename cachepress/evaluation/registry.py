"""Names that an evaluation knows: presses, data sets and scorers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from transformers import PreTrainedTokenizerBase

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.metrics import qa_f1, string_match
from cachepress.evaluation.tasks import builtin
from cachepress.evaluation.tasks.files import SUFFIXES, load_file, normalise
from cachepress.evaluation.tasks.longbench import load_longbench_e
from cachepress.spec import NO_PRESS, aliases

DEFAULT_LENGTH = 1000
Scorer = Callable[[str, Sequence[str]], float]
Loader = Callable[[EvaluationConfig, PreTrainedTokenizerBase], pd.DataFrame]

PRESS_REGISTRY: dict[str, str] = {
    NO_PRESS: NO_PRESS,
    **{alias: kind.__name__ for alias, kind in aliases().items()},
}
SCORER_REGISTRY: dict[str, Scorer] = {"string_match": string_match, "qa_f1": qa_f1}


@dataclass(frozen=True)
class Dataset:
    """A data set: how it is loaded, and which scorer judges it."""

    load: Loader
    scorer: str
    about: str


def _load_builtin(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    tasks, length = _builtin_part(config.data_dir)
    table = builtin.generate(tokenizer, tasks=tasks, length=length, seed=config.seed)
    return normalise(table, task="builtin", origin="builtin")


def _builtin_part(data_dir: str | None) -> tuple[Sequence[str], int]:
    """Tasks and length of "1000", "multi_key", "multi_key-1000" or nothing."""
    task, _, length = (data_dir or "").rpartition("-")
    if not length.isdigit():
        task, length = data_dir or "", str(DEFAULT_LENGTH)
    if task and task not in builtin.TASKS:
        raise CachepressError(
            f"builtin: got data_dir={data_dir!r}, wanted a length, a task or task-length, such as "
            f"1000 or multi_key-1000; tasks are {', '.join(builtin.TASKS)}"
        )
    return [task] if task else builtin.DEFAULT_TASKS, int(length)


DATASET_REGISTRY: dict[str, Dataset] = {
    "builtin": Dataset(_load_builtin, "string_match", "generated retrieval and counting tasks"),
    "longbench-e": Dataset(
        lambda config, _: load_longbench_e(config.data_dir, config.data_path),
        "qa_f1",
        "questions on long documents (hub, or --data-path)",
    ),
}


def find_dataset(name: str) -> Dataset:
    """A registered data set, or a local file as one.

    Raises:
        CachepressError: if there is no such name or file.
    """
    if name in DATASET_REGISTRY:
        return DATASET_REGISTRY[name]
    if Path(name).suffix in SUFFIXES:
        return Dataset(lambda config, _: load_file(Path(name)), "string_match", "a local file")
    raise CachepressError(
        f"unknown dataset {name!r}: wanted {', '.join(DATASET_REGISTRY)}, or a file ending in "
        f"{', '.join(SUFFIXES)}"
    )
