"""LooGLE, questions, gaps and summaries of documents after 2022 (Li et al., arXiv:2311.04939).

Its documents have many questions each; rows of one document have the same context. The official
evaluation reports several scores of an answer. A row names the main one, and the official ones are
reported beside it; METEOR only where WordNet is there, and BERTScore, which needs a model, not at
all.
"""

import ast
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import cast

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.metrics import bleu
from cachepress.evaluation.prompts import Template, read_prompts
from cachepress.evaluation.rouge import rouge_l
from cachepress.evaluation.tasks.base import Metric, Part, Report, Task, normalise
from cachepress.evaluation.tasks.fits import mapping
from cachepress.evaluation.tasks.sources import Hub, in_format, read_rows
from cachepress.generation.prompt import MIDDLE
from cachepress.hf.types import PreTrainedTokenizerBase

REPOSITORY = "bigai-nlco/LooGLE"
EMPTY = "None"
"""What the official evaluation reads in place of an empty answer."""
INTRODUCTION = "Read the following text. A question about it comes after it.\n\n"
ASK = "\n\nAnswer the question from the text.\nQuestion: {question}\n"
PARTS = {
    "longdep_qa": Part(INTRODUCTION, ASK, "Answer:", 500, "loogle_rouge_l_f1"),
    "shortdep_qa": Part(INTRODUCTION, ASK, "Answer:", 300, "loogle_rouge_l_f1"),
    "shortdep_cloze": Part(
        "Read the following text. A passage about it comes after it, in which names are hidden "
        "behind <mask-0>, <mask-1> and so on.\n\n",
        "\n\nEach <mask-n> in the passage below stands for a person, a place or an organization, "
        "and the same mask always for the same one.\nPassage: {question}\nWhat does each mask "
        "stand for? Answer with a mapping and nothing else, for example: "
        "{{'<mask-0>': 'Ada', '<mask-1>': 'The River Post', '<mask-2>': 'Mill Hill'}}\n",
        "Answer:",
        50,
        "loogle_exact_match",
    ),
    "summarization": Part(
        "Read the following paper. You will be asked to summarize it.\n\n",
        "\n\nWrite a summary of this paper.\n",
        "Summary:",
        500,
        "loogle_rouge_l_f1",
    ),
}


def load_loogle(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Load the rows of one task from the benchmark's own files.

    They have been published in two formats: one line a question, and, before that, one line a
    document with all its questions.

    Raises:
        CachepressError: if its file is not to be had, or is in another format.
    """
    task = str(config.data_dir)
    name, part, template = f"{task}.jsonl", PARTS[task], None
    if config.prompts is not None:
        needs = [] if task == "summarization" else [("Q", "question")]
        read = read_prompts(config.prompts)
        template = read.template((task, f"longdep_{task}"), ("input", "context"), needs)
    names = [name, f"data/{name}"]
    if task == "summarization":
        names.append(f"longdep_{name}")
    zipped = [Hub(REPOSITORY, "data.zip", name) for name in names]
    rows = read_rows(config.data_path, names, Hub(REPOSITORY, f"data/{name}"), *zipped)
    with in_format(name, "LooGLE's"):
        asked = [one for row in rows for one in _questions(row)]
        texts = [(*_asked(part, template, *one[:2]), _answers(task, one[2])) for one in asked]
    table = pd.DataFrame(texts, columns=["context", "question", "answer"])
    prefix = part.prefix if template is None else ""
    how = {"answer_prefix": prefix, "max_new_tokens": part.max_new_tokens, "metric": part.metric}
    return normalise(table.assign(**how), task=task, origin=name)


def _asked(part: Part, template: Template | None, document: str, question: str) -> tuple[str, str]:
    """Build context and question, in our words or a template's."""
    if template is not None:
        return template.around(document, {"Q": question, "question": question})
    return part.introduction + document, part.ask.format(question=question)


def _questions(row: Mapping) -> list[tuple[str, str, object]]:
    """Iterate over context, question and answer of every question of a line."""
    if "qa_pairs" not in row:
        return [(row["context"], row.get("question", ""), row["answer"])]
    if row["qa_pairs"] == "none":
        return [(row["input"], "", row["output"])]
    pairs = row["qa_pairs"]
    pairs = ast.literal_eval(pairs) if isinstance(pairs, str) else pairs
    return [(row["input"], pair["Q"], pair["A"]) for pair in pairs]


def _answers(task: str, answer: object) -> list[str]:
    """Convert an answer to text; of masks, the names that they stand for, as JSON."""
    if task != "shortdep_cloze":
        return [str(answer)]
    if isinstance(answer, list):
        answer = {f"<mask-{number}>": name for number, name in enumerate(answer)}
    if not isinstance(answer, dict) or not answer:
        raise ValueError(f"the masks are {answer!r}")
    return [json.dumps(answer, ensure_ascii=False)]


def exact_match(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score the share of masks that are filled with the same name."""
    found, wanted = _mapping(prediction), json.loads(answers[0])
    return sum(found.get(mask) == name for mask, name in wanted.items()) / len(wanted)


def partial_match(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score the share of masks that are filled with a word of the name."""
    found, wanted = _mapping(prediction), json.loads(answers[0])
    texts = {mask: text for mask, text in found.items() if isinstance(text, str)}
    right = [
        not set(name.split()).isdisjoint(texts.get(mask, "").split())
        for mask, name in wanted.items()
    ]
    return sum(right) / len(wanted)


def _mapping(prediction: str) -> dict:
    """Parse a text as a Python literal of a mapping; empty if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = ast.literal_eval(prediction)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def rouge_l_f1(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Compute the F1 of ROUGE-L."""
    return rouge_l(prediction or EMPTY, answers[0]).f


def rouge_l_recall(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Compute the recall of ROUGE-L, which the official evaluation reports."""
    return rouge_l(prediction or EMPTY, answers[0]).r


def _rouge(kind: str) -> Metric:
    """Make the metric of ROUGE-N recall."""

    def metric(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        """Score the share of the answer's n-grams that the prediction has."""
        from rouge import Rouge

        try:
            scores = Rouge(metrics=[kind]).get_scores(prediction or EMPTY, answers[0])
        except ValueError:
            # A text of full stops only has no sentence.
            return 0.0
        return cast(dict[str, dict[str, float]], scores[0])[kind]["r"]

    return metric


def _bleu(size: int) -> Metric:
    weights = [float(n == size) for n in (1, 2, 3, 4)]

    def metric(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        """Compute the precision of n-grams of one size, with a brevity penalty."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bleu(_words(prediction), answers[0].split(), weights)

    return metric


def meteor(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Compute METEOR of the words, each taken once and at its first position.

    The official evaluation takes them in the order of a set, which changes from run to run.

    Raises:
        CachepressError: if WordNet is not there.
    """
    import nltk.corpus
    from nltk.translate.meteor_score import single_meteor_score

    wanted, found = dict.fromkeys(answers[0].split()), dict.fromkeys(_words(prediction))
    try:
        return float(single_meteor_score(wanted, found, wordnet=nltk.corpus.wordnet))
    except LookupError as error:
        raise CachepressError(
            "METEOR needs WordNet: get it with python -m nltk.downloader wordnet"
        ) from error


def _words(prediction: str) -> list[str]:
    return (prediction or EMPTY).split()


def masks(answers: Sequence[str]) -> int:
    """Count the masks that an answer fills."""
    return len(json.loads(answers[0]))


METRICS: dict[str, Metric] = {
    "loogle_rouge_l_f1": rouge_l_f1,
    "loogle_rouge_1": _rouge("rouge-1"),
    "loogle_rouge_2": _rouge("rouge-2"),
    "loogle_rouge_4": _rouge("rouge-4"),
    "loogle_rouge_l": rouge_l_recall,
    "loogle_bleu_1": _bleu(1),
    "loogle_bleu_4": _bleu(4),
    "loogle_meteor": meteor,
    "loogle_exact_match": exact_match,
    "loogle_partial_match": partial_match,
}
OFFICIAL = ("rouge_1", "rouge_2", "rouge_l", "bleu_1", "bleu_4", "meteor")
REPORTS: dict[str, dict[str, Report]] = {
    "loogle_rouge_l_f1": {name: Report(METRICS[f"loogle_{name}"]) for name in OFFICIAL},
    # The official evaluation divides by the masks of all samples together.
    "loogle_exact_match": {
        "exact_match_of_all_masks": Report(exact_match, masks),
        "partial_match_of_all_masks": Report(partial_match, masks),
    },
}


LOOGLE = Task(
    name="loogle",
    about="questions, gaps and summaries of long documents (arXiv:2311.04939)",
    load=load_loogle,
    truncation=MIDDLE,
    takes_prompts=True,
    parts=tuple(PARTS),
    metrics=METRICS,
    reports=REPORTS,
    fits={"loogle_exact_match": mapping, "loogle_partial_match": mapping},
    official={task: part.metric for task, part in PARTS.items()}
    | {"longdep_summarization": PARTS["summarization"].metric},
)
