"""SCBench, twelve tasks of several turns on one context (Li et al., arXiv:2412.10319)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.prompts import Template, read_prompts
from cachepress.evaluation.tasks import fits
from cachepress.evaluation.tasks.base import Metric, Task, normalise
from cachepress.evaluation.tasks.functions import LANGUAGES, repeated_function
from cachepress.evaluation.tasks.infinitebench import (
    character_f1,
    choice,
    first_number,
    rouge_lsum,
)
from cachepress.evaluation.tasks.sources import Hub, in_format, read_rows
from cachepress.generation.prompt import MIDDLE
from cachepress.hf.types import PreTrainedTokenizerBase

REPOSITORY = "microsoft/SCBench"
LETTERS = "ABCD"
TURNS = (("user", "<<a question>>"), ("assistant", "<<an answer>>"), ("user", "<<another one>>"))


@dataclass(frozen=True)
class _Part:
    """Prompt and metric of one task.

    Attributes:
        max_new_tokens: most tokens of an answer.
        metric: what judges an answer; of a function, without its language.
        introduction: what stands before the context.
        ask: a turn.
        prefix: how an answer begins.
    """

    max_new_tokens: int
    metric: str
    introduction: str = ""
    ask: str = "{input}"
    prefix: str = ""


PARTS = {
    "scbench_kv": _Part(
        150,
        "scbench_substring",
        "The JSON object below maps keys to values. After it you are given keys, and are to return "
        "the value of each.\n\n",
    ),
    "scbench_prefix_suffix": _Part(150, "scbench_substring"),
    "scbench_vt": _Part(30, "scbench_all"),
    "scbench_repoqa": _Part(
        1024,
        "scbench_function",
        "Below is the code of a repository. After it functions are described. Find each in the "
        "code and repeat it exactly, in a code block between lines of ```.\n\n",
    ),
    "scbench_qa_eng": _Part(
        40,
        "scbench_any",
        "Read the following book. Then answer questions about it, in as few words as you can.\n\n",
        "Question: {input}\n",
        "Answer:",
    ),
    "scbench_qa_chn": _Part(
        40,
        "scbench_best_character",
        "请先读下面这本书，然后回答关于它的问题。\n\n",  # noqa: RUF001
        "问题：{input}\n",  # noqa: RUF001
        "答案：",  # noqa: RUF001
    ),
    "scbench_choice_eng": _Part(
        40,
        "scbench_choice",
        "Read the following book. Then answer questions about it.\n\n",
        "Question: {input}\n{options}\n\nWhich of A, B, C and D is right?\n",
        "The right answer is",
    ),
    "scbench_many_shot": _Part(10, "scbench_any"),
    "scbench_summary": _Part(200, "scbench_rouge_lsum"),
    "scbench_mf": _Part(
        5,
        "scbench_value",
        "Below is a long list of numbers. After it you are asked for some of them, or for numbers "
        "that describe the list.\n\n",
    ),
}
MIXED = {
    "scbench_summary_with_needles": {
        "scbench_summary": _Part(800, "scbench_rouge_lsum"),
        "scbench_passkey": _Part(15, "scbench_first_number"),
    },
    "scbench_repoqa_and_kv": {
        "scbench_repoqa": _Part(1024, "scbench_function"),
        "scbench_kv": _Part(80, "scbench_substring"),
    },
}
"""Parts whose turns are of two tasks, and say everything themselves."""


def load_scbench(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Load a row for each turn of one part from the benchmark's own files.

    All turns of a session have the same context. The question of a turn holds the turns before it
    with their reference answers, in the model's chat template, so that each turn can be asked on
    one cache of the context.

    Raises:
        CachepressError: if the file is not to be had, or is in another format.
    """
    part = str(config.data_dir)
    name = f"{part}.jsonl"
    parquet = (f"{part}.parquet", f"{part}/test-00000-of-00001.parquet")
    sessions = read_rows(
        config.data_path, [name, f"data/{name}", *parquet], Hub(REPOSITORY, f"data/{name}")
    )
    template = None
    if config.prompts is not None:
        choices = [(f"OPTION_{letter}",) for letter in LETTERS] * (part == "scbench_choice_eng")
        read = read_prompts(config.prompts)
        if read.rows:
            raise CachepressError(
                f"scbench: got the table {read.name}, and a turn holds those before it: wanted "
                "templates"
            )
        template = read.template((part,), needs=[("input", "question"), *choices])
    seams = _seams(tokenizer, config.chat is not False)
    with in_format(name, "SCBench's"):
        functions = _functions(part, sessions)
        rows = [
            row for session in sessions for row in _turns(part, session, functions, seams, template)
        ]
    return normalise(pd.DataFrame(rows), task=part, origin=name)


def _seams(tokenizer: PreTrainedTokenizerBase, chat: bool) -> tuple[str, str]:
    """Find the texts between a question and its answer, and the next question, by chat template."""
    if not chat or not tokenizer.chat_template:
        return "", "\n\n"
    text = str(
        tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in TURNS],
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=False,
        )
    )
    places = [(text.find(content), len(content)) for _, content in TURNS]
    if any(place < 0 for place, _ in places):
        raise CachepressError("the tokenizer's chat template drops an earlier turn")
    first, second = (text[start + size : end] for (start, size), (end, _) in pairwise(places))
    return first, second


def _turns(
    part: str,
    session: Mapping,
    functions: Mapping[str, Mapping[str, str]],
    seams: tuple[str, str],
    template: Template | None,
) -> list[dict[str, object]]:
    context = session["context"] if "context" in session else session["input"]
    if not isinstance(context, str):
        context = str([int(number) for number in context])
    to_answer, to_question = seams
    rows, before = [], "\n\n"
    for turn in session["multi_turns"]:
        task, how = part, PARTS.get(part)
        if how is None:
            task, how = f"{part}/{turn['task']}", MIXED[part][turn["task"]]
        text, asked, prefix = _asked(how, template, context, turn)
        if template is None:
            asked = before + asked
        elif rows:
            # A template says itself what stands between the context and the first turn only.
            asked = before + asked.lstrip("\n")
        row = {
            "context": text,
            "question": asked,
            "answer": _answers(part, turn),
            "answer_prefix": prefix,
            "max_new_tokens": how.max_new_tokens,
            "task": task,
            "metric": how.metric,
            "choices": None,
        }
        if how.metric == "scbench_function":
            row |= _function_row(turn, str(session["lang"]), functions[session["repo"]])
        rows.append(row)
        space = " " if prefix else ""
        before = f"{asked}{to_answer}{prefix}{space}{_reference(turn)}{to_question}"
    return rows


def _asked(
    how: _Part, template: Template | None, context: str, turn: Mapping
) -> tuple[str, str, str]:
    """Build context, question and answer's beginning of a turn, in our words or a template's."""
    if template is None:
        question = how.ask.format(input=turn["input"], options=_options(turn))
        return how.introduction + context, question, how.prefix
    options = zip(LETTERS, turn.get("options") or (), strict=False)
    fields = {"input": turn["input"], "question": turn["input"]}
    fields |= {f"OPTION_{letter}": option for letter, option in options}
    return *template.around(context, fields), ""


def _options(turn: Mapping) -> str:
    options = turn.get("options")
    if options is None:
        return ""
    pairs = zip(LETTERS, options, strict=True)
    return "\n".join(f"{letter}. {option}" for letter, option in pairs)


def _answers(part: str, turn: Mapping) -> list[str]:
    answer = turn["answer"]
    if part == "scbench_choice_eng":
        return [answer, LETTERS[list(turn["options"]).index(answer)]]
    return [str(answer)] if isinstance(answer, str | int | float) else [str(a) for a in answer]


def _reference(turn: Mapping) -> str:
    """Return a turn's answer as later turns see it."""
    return ", ".join(_answers("", turn))


def _functions(part: str, sessions: Sequence[Mapping]) -> dict[str, dict[str, str]]:
    """Map the code of each function that a repository is asked for to its name."""
    if part not in ("scbench_repoqa", "scbench_repoqa_and_kv"):
        return {}
    found: dict[str, dict[str, str]] = {}
    for session in sessions:
        for turn in session["multi_turns"]:
            if turn.get("task") in (None, "scbench_repoqa"):
                found.setdefault(session["repo"], {}).setdefault(turn["answer"], turn["name"])
    return found


def _function_row(turn: Mapping, language: str, functions: Mapping[str, str]) -> dict[str, object]:
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}")
    return {
        "answer": [code for code, name in functions.items() if name == turn["name"]],
        "metric": f"scbench_function_{language}",
        "choices": list(functions),
    }


def substring(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score 1 if the prediction contains the answer as it is spelt, else 0."""
    return float(answers[0] in prediction)


def any_answer(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score 1 if the prediction contains an answer, case ignored, else 0."""
    return float(any(answer.upper() in prediction.strip().upper() for answer in answers))


def all_answers(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score the share of answers that the prediction contains, case ignored, to two decimals."""
    return round(fmean(answer.lower() in prediction.lower() for answer in answers), 2)


def value(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score 1 if the first number is the expected one, else 0.

    The sign is left out, and decimals too where a whole number is expected.
    """
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None:
        return 0.0
    whole = re.fullmatch(r"-?\d+", answers[0]) is not None
    number = float(found[0])
    return float((number // 1 if whole else number) == float(answers[0]))


def best_character(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score the best F1 of the prediction's characters with one character of the answer.

    The benchmark's own scorer takes the characters of an answer for so many answers, so that a
    perfect one may have less than 1; ``infinitebench_character_f1`` takes it as one.
    """
    return character_f1(prediction, answers[0]) if answers[0] else 0.0


METRICS: dict[str, Metric] = {
    "scbench_substring": substring,
    "scbench_any": any_answer,
    "scbench_all": all_answers,
    "scbench_value": value,
    "scbench_choice": choice,
    "scbench_best_character": best_character,
    "scbench_rouge_lsum": rouge_lsum,
    "scbench_first_number": first_number,
} | {
    f"scbench_function_{language}": partial(repeated_function, language=language)
    for language in LANGUAGES
}
SCBENCH = Task(
    name="scbench",
    about="several turns on one compressed context (arXiv:2412.10319)",
    load=load_scbench,
    truncation=MIDDLE,
    takes_prompts=True,
    parts=(*PARTS, *MIXED),
    metrics=METRICS,
    fits={
        "scbench_value": fits.number,
        "scbench_choice": fits.some_letter,
        **{f"scbench_function_{language}": fits.listed_choice for language in LANGUAGES},
    },
)
