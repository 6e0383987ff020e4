"""LongBench-E, the part with questions and short answers (Bai et al., arXiv:2308.14508)."""

import pandas as pd
from transformers import PreTrainedTokenizerBase

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.metrics import qa_f1
from cachepress.evaluation.tasks.base import Task, normalise
from cachepress.evaluation.tasks.sources import Hub, read_rows

REPOSITORY = "THUDM/LongBench"
TASKS = ("2wikimqa_e", "hotpotqa_e", "multifieldqa_en_e", "qasper_e")
MAX_NEW_TOKENS = {"multifieldqa_en_e": 64, "qasper_e": 128}
INTRODUCTION = "Read the following text. A question about it comes after it.\n\n"
ASK = (
    "\n\nAnswer with the shortest phrase that is right, taken from the text, and add no "
    "explanation.\nQuestion: {question}"
)


def load_longbench_e(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """The rows of one task, from the benchmark's own files.

    Raises:
        CachepressError: if its file is not to be had, or is in another format.
    """
    task = str(config.data_dir)
    name = f"{task}.jsonl"
    rows = read_rows(config.data_path, [name], Hub(REPOSITORY, "data.zip", f"data/{name}"))
    try:
        table = pd.DataFrame(
            {
                "context": [INTRODUCTION + row["context"] for row in rows],
                "question": [ASK.format(question=row["input"]) for row in rows],
                "answer": [row["answers"] for row in rows],
                "answer_prefix": "Answer:",
                "max_new_tokens": MAX_NEW_TOKENS.get(task, 32),
                "length": [row["length"] for row in rows],
                "metric": "qa_f1",
            }
        )
    except (KeyError, TypeError) as error:
        raise CachepressError(f"{name} is not in LongBench's format: {error!r}") from error
    return normalise(table, task=task, origin=name)


LONGBENCH_E = Task(
    name="longbench-e",
    about="questions on long documents (arXiv:2308.14508)",
    load=load_longbench_e,
    parts=TASKS,
    metrics={"qa_f1": qa_f1},
)
