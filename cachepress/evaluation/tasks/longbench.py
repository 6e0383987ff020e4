"""LongBench in English, Chinese and code, and LongBench-E (Bai et al., arXiv:2308.14508)."""

# ruff: noqa: RUF001 (Chinese texts have Chinese punctuation)

import difflib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.metrics import CHINESE_PUNCTUATION, qa_f1, token_f1
from cachepress.evaluation.prompts import Template, read_prompts
from cachepress.evaluation.rouge import rouge_l
from cachepress.evaluation.tasks.base import Metric, Task, normalise
from cachepress.evaluation.tasks.fits import matching, some_choices
from cachepress.evaluation.tasks.sources import Hub, read_rows
from cachepress.generation.prompt import MIDDLE
from cachepress.hf.types import PreTrainedTokenizerBase

REPOSITORY = "THUDM/LongBench"
SUFFIX_E = "_e"
BUCKETS = {4000: "0-4k", 8000: "4-8k"}
"""LongBench-E is reported by length: words below which a row belongs to a bucket."""
LAST_BUCKET = "8k+"

WITHOUT_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
"""Tasks whose prompts the benchmark gives to chat models as they are: examples, or code."""
_CUE = re.compile(r"\n([^\n]{1,20}[:：])\s*\Z")


@dataclass(frozen=True)
class Prompt:
    """How a task is asked and judged.

    Attributes:
        before: stands before the context.
        ask: what is asked after it, with ``{input}`` for the row's own part.
        prefix: how the answer begins; None for the last line of the row's own part, which ends
            the way the examples before it do.
        max_new_tokens: most tokens of an answer.
        metric: name of the metric.
    """

    before: str
    ask: str
    prefix: str | None
    max_new_tokens: int
    metric: str = "qa_f1"


def _passages(max_new_tokens: int) -> Prompt:
    return Prompt(
        before="Read the following passages. A question about them comes after them.\n\n",
        ask=(
            "\n\nAnswer the question from the passages. Write only the answer and no other "
            "words.\n\nQuestion: {input}\n"
        ),
        prefix="Answer:",
        max_new_tokens=max_new_tokens,
    )


def _code(ask: str) -> Prompt:
    return Prompt(
        before="Continue the following code.\n",
        ask=ask,
        prefix="The next line of the code:\n",
        max_new_tokens=64,
        metric="longbench_code_similarity",
    )


PROMPTS: dict[str, Prompt] = {
    "narrativeqa": Prompt(
        before=(
            "Read the following story, a novel or the script of a film. A question about it comes "
            "after it.\n\nStory: "
        ),
        ask=(
            "\n\nAnswer the question about the story in as few words as you can, in a single "
            "phrase if possible. Do not explain.\n\nQuestion: {input}\n\n"
        ),
        prefix="Answer:",
        max_new_tokens=128,
    ),
    "qasper": Prompt(
        before=(
            "Read the following scientific article. A question about it comes after it.\n\n"
            "Article: "
        ),
        ask=(
            "\n\nAnswer the question about the article in as few words as you can, in a phrase or "
            'a sentence. Write "unanswerable" if the article does not say it. Answer a yes/no '
            'question with "yes", "no" or "unanswerable". Do not explain.\n\nQuestion: {input}\n\n'
        ),
        prefix="Answer:",
        max_new_tokens=128,
    ),
    "multifieldqa_en": _passages(64),
    "multifieldqa_zh": Prompt(
        before="下面是一篇文章，之后有一个关于它的问题，请用中文简要作答。\n\n",
        ask="\n\n请根据以上文章回答问题，只写答案，不写别的内容。\n\n问题：{input}\n",
        prefix="回答：",
        max_new_tokens=64,
        metric="longbench_qa_f1_zh",
    ),
    "hotpotqa": _passages(32),
    "2wikimqa": _passages(32),
    "musique": _passages(32),
    "dureader": Prompt(
        before="下面是几篇文章，之后有一个关于它们的问题。\n\n文章：",
        ask="\n\n请根据以上文章回答问题。\n\n问题：{input}\n",
        prefix="回答：",
        max_new_tokens=128,
        metric="longbench_rouge_zh",
    ),
    "gov_report": Prompt(
        before="Read the following report of a government agency.\n\nReport:\n",
        ask="\n\nSummarise the report on one page.\n\n",
        prefix="Summary:",
        max_new_tokens=512,
        metric="longbench_rouge",
    ),
    "qmsum": Prompt(
        before=(
            "Read the following transcript of a meeting. A question or an order about it comes "
            "after it.\n\nTranscript:\n"
        ),
        ask=(
            "\n\nAnswer the query about the meeting in one sentence or several.\n\nQuery: {input}\n"
        ),
        prefix="Answer:",
        max_new_tokens=512,
        metric="longbench_rouge",
    ),
    "multi_news": Prompt(
        before="Read the following articles of a newspaper.\n\nNews:\n",
        ask="\n\nSummarise all the news on one page.\n\n",
        prefix="Summary:",
        max_new_tokens=512,
        metric="longbench_rouge",
    ),
    "vcsum": Prompt(
        before="请阅读下面的会议记录。\n\n会议记录：\n",
        ask="\n\n请写一段话，总结会议的内容。\n\n",
        prefix="会议总结：",
        max_new_tokens=512,
        metric="longbench_rouge_zh",
    ),
    "trec": Prompt(
        before="Say what type the last question is of. The others show how.\n\n",
        ask="\n{input}",
        prefix=None,
        max_new_tokens=64,
        metric="longbench_classification",
    ),
    "triviaqa": Prompt(
        before=(
            "Answer the last question from its passage. Write only the answer and no other words. "
            "The others show how.\n\n"
        ),
        ask="\n\n{input}",
        prefix=None,
        max_new_tokens=32,
        metric="longbench_qa_f1_line",
    ),
    "samsum": Prompt(
        before="Summarise the last dialogue in a few short sentences. The others show how.\n\n",
        ask="\n\n{input}",
        prefix=None,
        max_new_tokens=128,
        metric="longbench_rouge_line",
    ),
    "lsht": Prompt(
        before="请指出最后一则新闻属于哪个类别，前面的新闻是示例。\n\n",
        ask="\n{input}",
        prefix=None,
        max_new_tokens=64,
        metric="longbench_classification",
    ),
    "passage_count": Prompt(
        before=(
            "Read the following paragraphs of Wikipedia with care. Some may be there several "
            "times. Count how many different ones there are.\n\n"
        ),
        ask=(
            "\n\nHow many different paragraphs are there, when each is counted once? Answer with "
            "the number alone, such as 1, 2 or 3.\n\n"
        ),
        prefix="The number is:",
        max_new_tokens=32,
        metric="longbench_count",
    ),
    "passage_retrieval_en": Prompt(
        before=(
            "Read the following paragraphs of Wikipedia. A summary of one of them comes after "
            "them.\n\n"
        ),
        ask=(
            "\n\nThis is the summary.\n\n{input}\n\nWhich paragraph does it summarise? Answer with "
            'the number of the paragraph, in the form "Paragraph 1", "Paragraph 2" and so on.\n\n'
        ),
        prefix="The answer is:",
        max_new_tokens=32,
        metric="longbench_retrieval",
    ),
    "passage_retrieval_zh": Prompt(
        before="请阅读下面的若干段文字，之后有其中一段的摘要。\n\n",
        ask=(
            "\n\n摘要如下：\n\n{input}\n\n"
            "这个摘要概括的是哪一段？请写出段落的编号，格式为“段落1”、“段落2”等。\n\n"
        ),
        prefix="答案是：",
        max_new_tokens=32,
        metric="longbench_retrieval_zh",
    ),
    "lcc": _code(""),
    "repobench-p": _code("{input}"),
}
TASKS = tuple(PROMPTS)
TASKS_E = tuple(
    task + SUFFIX_E
    for task in (
        "qasper",
        "multifieldqa_en",
        "hotpotqa",
        "2wikimqa",
        "gov_report",
        "multi_news",
        "trec",
        "triviaqa",
        "samsum",
        "passage_count",
        "passage_retrieval_en",
        "lcc",
        "repobench-p",
    )
)


def _best(judge: Callable[[str, str], float]) -> Metric:
    """A metric out of one that knows a single answer."""

    def metric(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        return max((judge(prediction, answer) for answer in answers), default=0.0)

    return metric


def _on_first_line(metric: Metric) -> Metric:
    """The metric without what a model makes up after the first line, such as a new example."""

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
    """The rows of one task of LongBench or LongBench-E, from the benchmark's own files.

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
    try:
        made = [_row(row, prompt, template) for row in rows]
        table = pd.DataFrame(made).assign(chat=uses_chat(task))
        if task.endswith(SUFFIX_E):
            table["task"] = [f"{task} {bucket(length)}" for length in table["length"]]
    except CachepressError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CachepressError(f"{name} is not in LongBench's format: {error!r}") from error
    return normalise(table, task=task, origin=name)


def uses_chat(task: str) -> bool:
    """Whether the benchmark puts a task, of LongBench or LongBench-E, into the chat template."""
    return task.partition(" ")[0].removesuffix(SUFFIX_E) not in WITHOUT_CHAT


def bucket(words: int) -> str:
    """The name of the lengths that a number of words belongs to."""
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
    """Context, question and answer's beginning in our words."""
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
