"""InfiniteBench, twelve tasks beyond 100k tokens (Zhang et al., arXiv:2402.13718)."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile

import pandas as pd

from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.metrics import CHINESE_PUNCTUATION, qa_f1, token_f1
from cachepress.evaluation.prompts import Template, read_prompts
from cachepress.evaluation.tasks import fits
from cachepress.evaluation.tasks.base import Part, Task, normalise
from cachepress.evaluation.tasks.sources import Hub, in_format, read_rows
from cachepress.generation.prompt import MIDDLE
from cachepress.hf.types import PreTrainedTokenizerBase

REPOSITORY = "xinrongzhang2022/InfiniteBench"
LETTERS = "ABCD"
CALL = re.compile(r"func_[0-9]+\(-?[0-9]+\)")
TARGET = re.compile(r"The \w+ number")
_OPTIONS = tuple((f"OPTION_{letter}",) for letter in LETTERS)
_INPUT = ("input", "question")
NEEDS: dict[str, Sequence[Sequence[str]]] = {
    "passkey": [_INPUT],
    "number_string": [_INPUT],
    "kv_retrieval": [_INPUT],
    "math_find": [_INPUT],
    "longbook_qa_eng": [_INPUT],
    "longbook_qa_chn": [_INPUT],
    "longbook_choice_eng": [_INPUT, *_OPTIONS],
    "code_run": [(*_INPUT, "func_call")],
    "code_debug": _OPTIONS,
}
"""What a template of a task has to name, besides its text."""
HIDDEN = (
    "Somewhere in the text below one piece of information is hidden among sentences that do not "
    "matter. Find it and keep it in mind: a question about it comes after the text.\n\n"
)
BOOK = "Read the following book. A question about it comes after it.\n\n"


PARTS = {
    "passkey": Part(HIDDEN, "\n\n{input}\n", "The pass key is", 6, "infinitebench_first_number"),
    "number_string": Part(
        HIDDEN, "\n\n{input}\n", "The sequence of digits is", 12, "infinitebench_first_number"
    ),
    "kv_retrieval": Part(
        "The JSON object below maps keys to values. Afterwards you are given one of the keys and "
        "are to return its value.\n\n",
        "\n\n{input}",
        "",
        50,
        "infinitebench_word",
    ),
    "longbook_sum_eng": Part(
        "Read the following book. You will be asked to summarize it.\n\n",
        "\n\nWrite a summary of this book.\n",
        "Summary:",
        1200,
        "infinitebench_rouge_lsum",
    ),
    "longbook_choice_eng": Part(
        BOOK,
        "\n\nQuestion: {input}\n\nExactly one of these options is right. Answer with its letter, "
        "A, B, C or D, and nothing else.\n{options}\n",
        "The letter of the right option is",
        40,
        "infinitebench_choice",
    ),
    "longbook_qa_eng": Part(
        BOOK,
        "\n\nAnswer in as few words as you can and add no explanation.\nQuestion: {input}\n",
        "Answer:",
        40,
        "qa_f1",
    ),
    "longbook_qa_chn": Part(
        "请先读下面这本书。书后有一个关于它的问题。\n\n",
        "\n\n问题：{input}\n回答越短越好，不要解释。\n",  # noqa: RUF001
        "答案：",  # noqa: RUF001
        40,
        "infinitebench_character_f1",
    ),
    "longdialogue_qa_eng": Part(
        "In the script below the name of one character is hidden in one place: $$MASK$$ stands "
        "there instead. Read it and work out who that is.\n\n",
        "\n\n{input}\nAnswer with the name of that one character, spelt as the script spells it "
        "in front of the colon, and nothing else.\n",
        "$$MASK$$ stands for",
        40,
        "infinitebench_speaker",
    ),
    "math_find": Part(
        "Below is a long list of numbers. One of them, or a number that describes the list, is "
        "asked for after it.\n\n",
        "\n\n{input}",
        "",
        3,
        "infinitebench_value",
    ),
    # The labels do not repeat the first number of the expression, so it is asked to be left out.
    "math_calc": Part(
        "Expression: ",
        "\n\nWork this expression out from left to right and list the value after each operation, "
        "without the first number itself. For example:\nExpression: 1 + 3 + 4\nValues: [4, 8]\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [5, 7, 3]\nWrite only the list, however long it is.\n",
        "Values:",
        30000,
        "infinitebench_leading_numbers",
    ),
    "code_run": Part(
        "Read the following Python functions. You will be asked what one of them returns.\n\n",
        "\n\nWhat exactly does {call} return? Be brief, and let the number be the last thing that "
        "you write.\n",
        "The value of {call} is",
        5,
        "infinitebench_last_number",
    ),
    "code_debug": Part(
        "In the Python code below exactly one function has an obvious error that was put there on "
        "purpose and makes it crash. Afterwards you choose it from four options.\n\n",
        "\n\nWhich of these functions has the error?\n{options}\nAnswer with the letter of the "
        "option, followed by a full stop.\n",
        "The right option is:",
        5,
        "infinitebench_function",
    ),
}


def load_infinitebench(
    config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase
) -> pd.DataFrame:
    """Load the rows of one task from the benchmark's own files.

    Raises:
        CachepressError: if its file is not to be had, or is in another format.
    """
    task = str(config.data_dir)
    name, part, template = f"{task}.jsonl", PARTS[task], None
    if config.prompts is not None:
        template = read_prompts(config.prompts).template((task,), needs=NEEDS.get(task, ()))
    rows = read_rows(config.data_path, [name], Hub(REPOSITORY, name))
    with in_format(name, "InfiniteBench's"):
        asked = [(*_asked(task, row, template), _answers(task, row)) for row in rows]
    table = pd.DataFrame(asked, columns=["context", "question", "answer_prefix", "answer"])
    table = table.assign(max_new_tokens=part.max_new_tokens, metric=part.metric)
    return normalise(table, task=task, origin=name)


def _asked(task: str, row: Mapping, template: Template | None) -> tuple[str, str, str]:
    """Build the context, question and answer's beginning of a row."""
    part, fields = PARTS[task], _fields(task, row)
    if template is None:
        context = part.introduction + row["context"]
        return context, part.ask.format(**fields), part.prefix.format(**fields)
    return *template.around(row["context"], _template_fields(row, fields)), ""


def _template_fields(row: Mapping, fields: Mapping[str, str]) -> dict[str, str]:
    """Return the values that fill the benchmark's own templates."""
    asked, call = str(row.get("input", "")), fields["call"]
    found = {"input": asked, "question": asked}
    if call:
        found |= {"func_call": call, "func": call.partition("(")[0]}
    if target := TARGET.search(asked):
        found["target"] = target.group().lower()
    options = row.get("options")
    named = zip(LETTERS, () if options is None else options, strict=False)
    return found | {f"OPTION_{letter}": text for letter, text in named}


def _fields(task: str, row: Mapping) -> dict[str, str]:
    """Return the values that fill the prompts of a row."""
    fields = {"input": str(row.get("input", "")).strip(), "options": "", "call": ""}
    if task in ("longbook_choice_eng", "code_debug"):
        options = zip(LETTERS, row["options"], strict=True)
        fields["options"] = "\n".join(f"{letter}. {text}" for letter, text in options)
    if task == "code_run":
        found = CALL.search(fields["input"])
        if found is None:
            raise ValueError(f"no call in {fields['input'][:60]!r}")
        fields["call"] = found.group()
    return fields


def _answers(task: str, row: Mapping) -> list[str]:
    """Convert the label to answers; of a choice, the text of the right option and its letter."""
    label = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if label and isinstance(label[0], list):
        label = label[0]
    if task in ("longbook_choice_eng", "code_debug") and label[1:] not in [[c] for c in LETTERS]:
        (text,) = label
        label = [text, LETTERS[row["options"].index(text)]]
    return [str(item) for item in label]


def first_number(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score whether the first run of digits is the expected one."""
    found = re.search("[0-9]+", prediction)
    return float(found is not None and found.group() == answers[0])


def word(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score whether the expected word is among the words."""
    return float(answers[0] in _split(prediction, "\n:\"'.,?!{}"))


def speaker(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score whether the first of the names, in capitals, is among the words."""
    return word(prediction.upper(), answers)


def last_number(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score whether the last word is the expected whole number."""
    try:
        return float(int(_split(prediction, "\n.`'\":")[-1]) == int(answers[0]))
    except (IndexError, ValueError):
        return 0.0


def value(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score whether the first number, its sign left out, is the expected one."""
    found = re.search(r"\d+\.\d+|\d+", prediction)
    return float(found is not None and float(found.group()) == float(answers[0]))


def leading_numbers(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Share of the expected numbers before the first that is wrong; signs are left out.

    Numbers are compared as texts, since a model may write one that is too long to convert.
    """
    found = [digits.lstrip("0") or "0" for digits in re.findall("[0-9]+", prediction)]
    pairs = zip(found, answers, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / len(answers)


def choice(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score whether the text or the letter of the right option is chosen.

    Looked at in this order: a letter at the very beginning, the whole text, what follows words
    like "answer is", the first word that is a letter.
    """
    text = prediction.strip()
    if text[:1] and text[0] in LETTERS:
        return float(text[0] in answers)
    if text in answers:
        return 1.0
    text = _clean(text, r"[\n\"'.,?!{}]")
    rest = _after(text, ("answer is:", "answer:", "answer is", "option is"))
    if rest is not None:
        return float(rest.startswith(tuple(answers)))
    letters = [found for found in text.split() if found in LETTERS]
    return float(bool(letters) and letters[0] in answers)


def function(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score whether the name or the letter of the right function is chosen.

    The letter counts at the very beginning with a full stop or colon, and either one counts
    after words like "answer is:".
    """
    text, letter = prediction.strip(), answers[1]
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = _clean(text, r"[\n`'\"*-]|[Oo]ption")
    rest = _after(text, ("answer is:", "is:", "answer:", "correct option is:"))
    return float(rest is not None and rest.startswith((letter, answers[0])))


def character_f1(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Best F1 of characters shared with one of the answers; punctuation and spaces ignored."""
    found = _characters(prediction)
    return max(token_f1(found, _characters(answer)) for answer in answers)


def rouge_lsum(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Best ROUGE-Lsum F1 with one of the answers, a sentence being a line, words not stemmed."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeLsum"])
    return max(scorer.score(answer, prediction)["rougeLsum"].fmeasure for answer in answers)


def _split(text: str, separators: str) -> list[str]:
    return text.translate(dict.fromkeys(map(ord, separators), " ")).split()


def _clean(text: str, noise: str) -> str:
    return re.sub(" +", " ", re.sub(noise, " ", text))


def _after(text: str, openings: Sequence[str]) -> str | None:
    """Return the text after the first opening that occurs, without the character after it."""
    for opening in openings:
        place = text.find(opening)
        if place >= 0:
            return text[place + len(opening) + 1 :]
    return None


def _characters(text: str) -> list[str]:
    return [c for c in text.lower() if c not in CHINESE_PUNCTUATION and not c.isspace()]


INFINITEBENCH = Task(
    name="infinitebench",
    about="retrieval, books, dialogue, code and sums beyond 100k tokens (arXiv:2402.13718)",
    load=load_infinitebench,
    truncation=MIDDLE,
    takes_prompts=True,
    parts=tuple(PARTS),
    metrics={
        "qa_f1": qa_f1,
        "infinitebench_first_number": first_number,
        "infinitebench_word": word,
        "infinitebench_speaker": speaker,
        "infinitebench_last_number": last_number,
        "infinitebench_value": value,
        "infinitebench_leading_numbers": leading_numbers,
        "infinitebench_choice": choice,
        "infinitebench_function": function,
        "infinitebench_character_f1": character_f1,
        "infinitebench_rouge_lsum": rouge_lsum,
    },
    fits={
        "infinitebench_first_number": fits.whole,
        "infinitebench_last_number": fits.signed,
        "infinitebench_value": fits.number,
        "infinitebench_leading_numbers": fits.several,
        "infinitebench_choice": fits.some_letter,
        "infinitebench_function": fits.text_and_letter,
    },
    official={task: part.metric for task, part in PARTS.items()},
)
