"""LongBench in English, Chinese and code, and LongBench-E (Bai et al., arXiv:2308.14508)."""

import difflib
import logging
import re
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.metrics import CHINESE_PUNCTUATION, qa_f1, token_f1
from cachepress.evaluation.prompts import Template, read_prompts
from cachepress.evaluation.rouge import rouge_l
from cachepress.evaluation.tasks.base import Metric, Task, normalise
from cachepress.evaluation.tasks.fits import matching, some_choices
from cachepress.evaluation.tasks.longbench_prompts import PROMPTS, Prompt
from cachepress.evaluation.tasks.sources import Hub, in_format, read_rows
from cachepress.generation.prompt import MIDDLE
from cachepress.hf.types import PreTrainedTokenizerBase

REPOSITORY = "THUDM/LongBench"
SUFFIX_E = "_e"
BUCKETS = {4000: "0-4k", 8000: "4-8k"}
"""LongBench-E is reported by length: words below which a row belongs to a bucket."""
LAST_BUCKET = "8k+"

WITHOUT_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
"""Tasks whose prompts the benchmark gives to chat models as they are: examples, or code."""
_CUE = re.compile("\n([^\n]{1,20}[:\uff1a])\\s*\\Z")
TASKS = tuple(PROMPTS)
_OF_E = (
    "qasper multifieldqa_en hotpotqa 2wikimqa gov_report multi_news trec triviaqa samsum "
    "passage_count passage_retrieval_en lcc repobench-p"
)
TASKS_E = tuple(task + SUFFIX_E for task in _OF_E.split())


def _best(judge: Callable[[str, str], float]) -> Metric:
    """Make a metric that takes the best of several answers."""

    def metric(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        return max((judge(prediction, answer) for answer in answers), default=0.0)

    return metric


def _on_first_line(metric: Metric) -> Metric:
    """Make a metric of the prediction's first line: models may go on with new examples."""

    def line_metric(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        return metric(prediction.lstrip("\n").split("\n")[0], answers, choices)

    return line_metric


def _chinese_words(text: str) -> list[str]:
    import jieba

    jieba.setLogLevel(logging.WARNING)
    return list(jieba.cut(text))


def _chinese_f1(prediction: str, answer: str) -> float:
    return token_f1(_plain(_chinese_words(prediction)), _plain(_chinese_words(answer)))


def _plain(words: Sequence[str]) -> list[str]:
    plain = ["".join(c for c in word.lower() if c not in CHINESE_PUNCTUATION) for word in words]
    return [word for word in ("".join(word.split()) for word in plain) if word]


def _rouge_l(prediction: str, answer: str) -> float:
    return rouge_l(prediction, answer).f


def _chinese_rouge_l(prediction: str, answer: str) -> float:
    return _rouge_l(" ".join(_chinese_words(prediction)), " ".join(_chinese_words(answer)))


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _paragraph(word: str) -> Callable[[str, str], float]:
    def judge(prediction: str, answer: str) -> float:
        found = re.search(rf"{word}(\d+)", answer)
        return _share_of_numbers(prediction, found[1]) if found else 0.0

    return judge


def _code_similarity(prediction: str, answer: str) -> float:
    lines = prediction.lstrip("\n").split("\n")
    written = (line for line in lines if not any(mark in line for mark in ("`", "#", "//")))
    ratio = difflib.SequenceMatcher(None, next(written, ""), answer).ratio()
    return round(100 * ratio) / 100


def _classification(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    return max((_class_score(prediction, answer, choices) for answer in answers), default=0.0)


def _class_score(prediction: str, answer: str, choices: Sequence[str]) -> float:
    named = [name for name in choices if name in prediction]
    place = 0
    # Part of the answer's own name does not count, but the name right after it is not looked at:
    # that is how the benchmark scores.
    while place < len(named):
        if named[place] in answer and named[place] != answer:
            named.remove(named[place])
        place += 1
    return 1 / len(named) if answer in named else 0.0


METRICS: dict[str, Metric] = {
    "qa_f1": qa_f1,
    "longbench_qa_f1_line": _on_first_line(qa_f1),
    "longbench_qa_f1_zh": _best(_chinese_f1),
    "longbench_rouge": _best(_rouge_l),
    "longbench_rouge_line": _on_first_line(_best(_rouge_l)),
    "longbench_rouge_zh": _best(_chinese_rouge_l),
    "longbench_classification": _on_first_line(_classification),
    "longbench_retrieval": _best(_paragraph("Paragraph ")),
    "longbench_retrieval_zh": _best(_paragraph("段落")),
    "longbench_count": _best(_share_of_numbers),
    "longbench_code_similarity": _best(_code_similarity),
}


FITS = {
    "longbench_classification": some_choices,
    "longbench_retrieval": matching(".*Paragraph [0-9].*", 'an answer such as "Paragraph 1"'),
    "longbench_retrieval_zh": matching(".*段落[0-9].*", 'an answer such as "段落1"'),
    "longbench_count": matching("[0-9]+", "a whole number"),
}


def load_longbench(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Load the rows of one task of LongBench or LongBench-E from the benchmark's own files.

    Raises:
        CachepressError: if its file is not to be had, or is in another format.
    """
    task = str(config.data_dir)
    name = f"{task}.jsonl"
    hub = Hub(REPOSITORY, "data.zip", f"data/{name}")
    rows = read_rows(config.data_path, [name, f"data/{name}"], hub)
    name_e = task.removesuffix(SUFFIX_E)
    prompt, template = PROMPTS[name_e], None
    if config.prompts is not None:
        needs = [("input",)] if "{input}" in prompt.ask else []
        template = read_prompts(config.prompts).template((task, name_e), needs=needs)
    with in_format(name, "LongBench's"):
        made = [_row(row, prompt, template) for row in rows]
        table = pd.DataFrame(made).assign(chat=uses_chat(task))
        if task.endswith(SUFFIX_E):
            table["task"] = [f"{task} {bucket(length)}" for length in table["length"]]
    return normalise(table, task=task, origin=name)


def uses_chat(task: str) -> bool:
    """Tell whether the benchmark puts a task, of LongBench or -E, into the chat template."""
    return task.partition(" ")[0].removesuffix(SUFFIX_E) not in WITHOUT_CHAT


def bucket(words: int) -> str:
    """Name the range of lengths that a number of words is in."""
    return next((name for most, name in BUCKETS.items() if words < most), LAST_BUCKET)


def _row(row: Mapping, prompt: Prompt, template: Template | None) -> dict[str, object]:
    if prompt.metric == "longbench_classification" and not row["all_classes"]:
        raise ValueError("a row has no classes")
    context, question, prefix = _asked(row, prompt)
    if template is not None:
        fields = {name: value for name, value in row.items() if name != "answers"}
        (context, question), prefix = template.around(row["context"], fields), ""
    return {
        "context": context,
        "question": question,
        "answer": row["answers"],
        "answer_prefix": prefix,
        "max_new_tokens": prompt.max_new_tokens,
        "metric": prompt.metric,
        "choices": row["all_classes"],
        "length": row["length"],
    }


def _asked(row: Mapping, prompt: Prompt) -> tuple[str, str, str]:
    """Build context, question and answer's beginning, in our words."""
    question, prefix = prompt.ask.format(input=row["input"]), prompt.prefix
    if prefix is None:
        cue = _CUE.search(question)
        question, prefix = (question[: cue.start(1)], cue[1]) if cue else (question, "")
    return prompt.before + row["context"], question, prefix


LONGBENCH = Task(
    name="longbench",
    about="21 tasks on long texts in English, Chinese and code (arXiv:2308.14508)",
    load=load_longbench,
    truncation=MIDDLE,
    takes_prompts=True,
    parts=TASKS,
    metrics=METRICS,
    fits=FITS,
    official={task: prompt.metric for task, prompt in PROMPTS.items()},
)
LONGBENCH_E = Task(
    name="longbench-e",
    about="13 tasks of LongBench, each scored by length (arXiv:2308.14508)",
    load=load_longbench,
    truncation=MIDDLE,
    takes_prompts=True,
    parts=TASKS_E,
    metrics=METRICS,
    official={task: PROMPTS[task.removesuffix(SUFFIX_E)].metric for task in TASKS_E},
)
