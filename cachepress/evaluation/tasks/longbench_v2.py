"""LongBench v2, multiple choice on long texts (Bai et al., arXiv:2412.15204)."""

import re
from collections.abc import Mapping, Sequence

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.prompts import Template, read_prompts
from cachepress.evaluation.tasks.base import Task, normalise
from cachepress.evaluation.tasks.fits import matching
from cachepress.evaluation.tasks.sources import Hub, in_format, read_rows
from cachepress.generation.prompt import MIDDLE
from cachepress.hf.types import PreTrainedTokenizerBase

FILE = "data.json"
HUB = Hub("THUDM/LongBench-v2", FILE)
LETTERS = ("A", "B", "C", "D")
DIFFICULTIES = ("easy", "hard")
LENGTHS = ("short", "medium", "long")
MAX_NEW_TOKENS = 128
CONTEXT = (
    "Read the following text. A question about it comes after it.\n\n<text>\n{text}\n</text>\n\n"
)
ASK = (
    "Which answer to this question is correct?\n{question}\n\n(A) {choice_A}\n(B) {choice_B}\n"
    "(C) {choice_C}\n(D) {choice_D}\n\nWrite your answer in this form, with the letter of the "
    'correct answer for the X: "The correct answer is (X)".'
)
_FORMS = (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])")


def longbench_v2_choice(
    prediction: str, answers: Sequence[str], choices: Sequence[str] = ()
) -> float:
    """Score whether the prediction names the right letter in the form that was asked for."""
    return float(_letter(prediction) in answers)


def _letter(prediction: str) -> str | None:
    """Find the letter that is named: one in brackets, or else one without."""
    plain = prediction.replace("*", "")
    for form in _FORMS:
        if found := re.search(form, plain):
            return found[1]
    return None


def load_longbench_v2(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Load the rows of a difficulty, of a length, or all; tasks are named "easy-short".

    Raises:
        CachepressError: if there is no such part, the file is not to be had, or is in another
            format.
    """
    part = config.data_dir
    if part is not None and part not in (*DIFFICULTIES, *LENGTHS):
        raise CachepressError(
            f"longbench-v2: got data_dir={part!r}, wanted nothing or one of "
            f"{', '.join((*DIFFICULTIES, *LENGTHS))}"
        )
    rows = read_rows(config.data_path, [FILE], HUB)
    template = None
    if config.prompts is not None:
        needs = [("Q", "question", "input"), *((f"C_{c}", f"choice_{c}", c) for c in LETTERS)]
        read = read_prompts(config.prompts)
        template = read.template(("longbench-v2",), ("DOC", "context"), needs)
    with in_format(FILE, "LongBench v2's"):
        made = [
            _row(row, template) for row in rows if part in (None, row["difficulty"], row["length"])
        ]
    if not made:
        raise CachepressError(f"{FILE} has no rows of the part {part}")
    return normalise(pd.DataFrame(made), task="longbench-v2", origin=FILE)


def _row(row: Mapping, template: Template | None) -> dict[str, object]:
    for name, known in (("answer", LETTERS), ("difficulty", DIFFICULTIES), ("length", LENGTHS)):
        if row[name] not in known:
            raise ValueError(f"{name} is {row[name]!r}")
    asked = {f"choice_{letter}": row[f"choice_{letter}"].strip() for letter in LETTERS}
    text, question = row["context"].strip(), row["question"].strip()
    context, ask = CONTEXT.format(text=text), ASK.format(question=question, **asked)
    if template is not None:
        choices = {key: asked[f"choice_{c}"] for c in LETTERS for key in (f"C_{c}", c)}
        fields = {"Q": question, "question": question, "input": question, **choices, **asked}
        context, ask = template.around(text, fields)
    return {
        "context": context,
        "question": ask,
        "answer": row["answer"],
        "max_new_tokens": MAX_NEW_TOKENS,
        "task": f"{row['difficulty']}-{row['length']}",
        "metric": "longbench_v2_choice",
        "choices": list(LETTERS),
    }


LONGBENCH_V2 = Task(
    name="longbench-v2",
    about="multiple choice on long texts, by difficulty and length (arXiv:2412.15204)",
    load=load_longbench_v2,
    truncation=MIDDLE,
    takes_prompts=True,
    metrics={"longbench_v2_choice": longbench_v2_choice},
    fits={"longbench_v2_choice": matching("[A-D]", "a letter from A to D")},
    official={"longbench-v2": "longbench_v2_choice"},
)
