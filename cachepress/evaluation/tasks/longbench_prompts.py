"""Prompts of LongBench's tasks, in our words, and their metrics."""

# ruff: noqa: RUF001 (Chinese texts have Chinese punctuation)

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """Prompt and metric of a task.

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
