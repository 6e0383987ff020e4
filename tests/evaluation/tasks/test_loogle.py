"""LooGLE in both of its formats; scores are those of the official evaluation."""

import inspect
import json
import sys
import zipfile
from statistics import fmean
from types import SimpleNamespace

import huggingface_hub
import nltk.corpus
import pandas as pd
import pytest
from nltk.corpus.reader import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.results import scores_of
from cachepress.evaluation.summary import task_table
from cachepress.evaluation.tasks.loogle import LOOGLE

TINY = sys.float_info.min
MILL = "The old mill stands by the river. Ada built it in 1901."
HOME = "Ada drives a red auto home"
# Answer, prediction, then the official numbers: BLEU-1 and -4, recall of ROUGE-1, -2 and -L, and
# F1 of ROUGE-L.
SIMILAR = [
    (
        *(MILL, "Ada built the mill in 1901. It stands by the old river."),
        *(0.8333333333333334, TINY),
        *(0.8333333333333334, 0.36363636363636365, 0.6666666666666666, 0.6956521689224953),
    ),
    (
        *(MILL, "Ada built\nthe old mill"),
        *(0.2465969639416065, 0.2465969639416065 * TINY),
        *(0.4166666666666667, 0.18181818181818182, 0.3333333333333333, 0.4705882311418686),
    ),
    (MILL, "nobody knows", 0, 0, 0, 0, 0, 0),
    (MILL, "", 0, 0, 0, 0, 0, 0),
    (
        *("None of them", "", 0.1353352832366127, 0.1353352832366127 * TINY),
        *(0.3333333333333333, 0, 0.3333333333333333, 0.4999999962500001),
    ),
    (
        *(HOME, "Ada drives a red car home today", 0.7142857142857143, 0.25),
        *(0.8333333333333334, 0.6, 0.8333333333333334, 0.7692307642603551),
    ),
]
NAMES = ("bleu_1", "bleu_4", "rouge_1", "rouge_2", "rouge_l", "rouge_l_f1")
MASKS = {"<mask-0>": "Ada Byron", "<mask-1>": "Mill Hill"}
# Prediction, exact and partial matches of the two masks.
FILLED = [
    ("{'<mask-0>': 'Ada Byron', '<mask-1>': 'Mill Hill'}", 2, 2),
    (" {'<mask-0>': 'Ada', '<mask-1>': 'Mill Hill', '<mask-2>': 'x'}", 1, 2),
    ('{"<mask-1>": "the Hill"}\n', 0, 1),
    ("{'<mask-0>': 'ada byron'}", 0, 0),
    ("The answer is {'<mask-0>': 'Ada Byron'}", 0, 0),
    ("['Ada Byron', 'Mill Hill']", 0, 0),
    ("{'<mask-0>': Ada}", 0, 0),
    ("None", 0, 0),
    ("", 0, 0),
]


def score(name, prediction, answer):
    return LOOGLE.metrics[f"loogle_{name}"](prediction, [answer], [])


def write(folder, file, *rows):
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def load(task, folder):
    config = EvaluationConfig(dataset="loogle", data_dir=task, data_path=folder)
    return LOOGLE.table(config, None)


@pytest.mark.parametrize("case", SIMILAR)
def test_a_text_scores_as_officially(case):
    answer, prediction, *expected = case
    scores = [score(name, prediction, answer) for name in NAMES]
    assert scores == pytest.approx(expected, rel=1e-12, abs=0)


def test_rouge_4_is_the_recall_of_four_words():
    # Three runs of four words, of which "Ada drives a red" is shared.
    assert score("rouge_4", "Ada drives a red car home today", HOME) == pytest.approx(1 / 3)


def test_a_text_of_full_stops_only_has_no_sentence():
    assert [score(name, "...", MILL) for name in ("rouge_1", "rouge_l", "rouge_l_f1")] == [0, 0, 0]


def deeper(calls, function):
    return function() if not calls else deeper(calls - 1, function)


def test_rouge_is_the_same_for_long_texts_and_from_deep_in_the_stack():
    limit = sys.getrecursionlimit()
    many = [f"w{number}" for number in range(3000)]
    whole, half = " ".join(many), " ".join(many[::2])
    assert score("rouge_l", whole, whole) == 1
    assert score("rouge_l", half, whole) == 0.5
    deep = limit - len(inspect.stack()) - 100
    for name in ("rouge_l", "rouge_l_f1", "rouge_1", "rouge_2", "bleu_1"):
        far = deeper(deep, lambda name=name: score(name, half, whole))
        assert far == score(name, half, whole)
    assert sys.getrecursionlimit() == limit


class WordNet:
    """As much of WordNet as the words here need: "auto" is another word for "car"."""

    def synsets(self, word):
        names = {"car": ["car", "auto", "motorcar"]}.get(word, [])
        lemmas = [SimpleNamespace(name=lambda name=name: name) for name in names]
        return [SimpleNamespace(lemmas=lambda: lemmas)]


# The first four do not depend on the order of the words, which the official evaluation leaves
# open. The others are its numbers for the words in the order in which they occur first.
@pytest.mark.parametrize(
    ("answer", "prediction", "expected"),
    [
        (MILL, "nobody knows", 0),
        ("None of them", "", 0.17857142857142855),
        (HOME, "driving", 0.0909090909090909),
        (HOME, "car", 0.0909090909090909),
        (MILL, "Ada built the mill in 1901. It stands by the old river.", 0.7465796235849711),
        (MILL, "Ada built the old mill", 0.3946902654867257),
        (HOME, "Ada drives a red car home today", 0.981329690346084),
    ],
)
def test_meteor(monkeypatch, answer, prediction, expected):
    monkeypatch.setattr(nltk.corpus, "wordnet", WordNet())
    assert score("meteor", prediction, answer) == pytest.approx(expected, rel=1e-12)


def test_without_wordnet_the_way_out_is_named(monkeypatch):
    absent = LazyCorpusLoader("no-such-corpus", WordNetCorpusReader)
    monkeypatch.setattr(nltk.corpus, "wordnet", absent)
    with pytest.raises(cp.CachepressError, match="python -m nltk.downloader wordnet") as caught:
        score("meteor", "another", MILL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("prediction", "exact", "partial"), FILLED)
def test_masks_score_as_officially(prediction, exact, partial):
    answer = json.dumps(MASKS)
    assert score("exact_match", prediction, answer) == exact / 2
    assert score("partial_match", prediction, answer) == partial / 2


@pytest.mark.parametrize(
    "prediction", ["{'<mask-0>': 3}", "{[]: 1}", "{'<mask-0>': print('x')}", "(" * 300]
)
def test_what_is_not_a_mapping_of_texts_fills_nothing(prediction, capsys):
    assert score("exact_match", prediction, json.dumps(MASKS)) == 0
    assert score("partial_match", prediction, json.dumps(MASKS)) == 0
    assert capsys.readouterr().out == ""


def predictions(task, rows):
    """A table of answers and predictions, each of a context of its own."""
    metric = {"shortdep_cloze": "loogle_exact_match"}.get(task, "loogle_rouge_l_f1")
    table = pd.DataFrame(rows, columns=["predicted_answer", "answer"])
    table = table.assign(task=task, metric=metric, context_id=range(len(rows)))
    table["answer"] = [[answer] for answer in table["answer"]]
    table["choices"] = [[] for _ in rows]
    columns = zip(table["predicted_answer"], table["answer"], strict=True)
    return table.assign(
        score=[LOOGLE.metrics[metric](said, answer, []) for said, answer in columns]
    )


def test_the_official_numbers_stand_beside_the_f1(monkeypatch, caplog):
    rows = [(prediction, answer) for answer, prediction, *_ in SIMILAR]
    monkeypatch.setattr(nltk.corpus, "wordnet", WordNet())
    found = scores_of(predictions("longdep_qa", rows))
    reported = found.reported["longdep_qa"]
    assert list(reported) == ["rouge_1", "rouge_2", "rouge_l", "bleu_1", "bleu_4", "meteor"]
    for place, name in enumerate(NAMES, start=2):
        mean = found.score if name == "rouge_l_f1" else reported[name]
        assert mean.mean == pytest.approx(fmean(case[place] for case in SIMILAR))
    assert reported["rouge_l"].low < reported["rouge_l"].mean < reported["rouge_l"].high
    absent = LazyCorpusLoader("no-such-corpus", WordNetCorpusReader)
    monkeypatch.setattr(nltk.corpus, "wordnet", absent)
    with caplog.at_level("INFO"):
        found = scores_of(predictions("longdep_qa", rows))
    assert list(found.reported["longdep_qa"]) == list(reported)[:-1]
    assert "meteor is not reported: METEOR needs WordNet" in caplog.text


def test_the_cloze_is_divided_over_all_masks():
    three = {f"<mask-{n}>": f"name {n}" for n in range(3)}
    rows = [
        ("{'<mask-0>': 'Ada Byron'}", json.dumps({"<mask-0>": "Ada Byron"})),
        ("{'<mask-0>': 'name 7'}", json.dumps(three)),
        ("", json.dumps(MASKS)),
    ]
    found = scores_of(predictions("shortdep_cloze", rows))
    assert found.score.mean == pytest.approx(1 / 3)
    assert found.tasks["shortdep_cloze"].mean == pytest.approx(1 / 3)
    reported = found.reported["shortdep_cloze"]
    assert reported["exact_match_of_all_masks"].mean == pytest.approx(1 / 6)
    assert reported["partial_match_of_all_masks"].mean == pytest.approx(2 / 6)
    assert reported["exact_match_of_all_masks"].samples == 3
    # Weights that are all the same are none.
    alike = scores_of(predictions("shortdep_cloze", [rows[2], (rows[0][0], json.dumps(MASKS))]))
    assert alike.reported["shortdep_cloze"]["exact_match_of_all_masks"].mean == 0.25
    table = task_table(found)
    assert "shortdep_cloze: exact_match_of_all_masks    0.167" in table
    assert "shortdep_cloze                              0.333" in table


@pytest.mark.parametrize("task", ["longdep_qa", "shortdep_qa"])
def test_both_formats_have_the_same_rows(tmp_path, task):
    (tmp_path / "old").mkdir()
    pairs = [{"Q": "Who built it?", "A": "Ada", "S": ["..."]}, {"Q": "When?", "A": 1901}]
    old = {"input": MILL, "title": "Mill", "qa_pairs": str(pairs), "output": "none"}
    write(tmp_path / "old", f"{task}.jsonl", old)
    rows = [{"context": MILL, "question": pair["Q"], "answer": pair["A"]} for pair in pairs]
    write(tmp_path, f"data/{task}.jsonl", *rows)
    table = load(task, str(tmp_path))
    assert table.equals(load(task, str(tmp_path / "old")))
    assert len(set(table["context"])) == 1
    assert table["context"][0].endswith(f"after it.\n\n{MILL}")
    assert [text.split("\n")[-2] for text in table["question"]] == [
        "Question: Who built it?",
        "Question: When?",
    ]
    assert list(table["answer"]) == [["Ada"], ["1901"]]
    assert list(table["max_new_tokens"]) == [{"longdep_qa": 500, "shortdep_qa": 300}[task]] * 2
    assert list(table["metric"]) == ["loogle_rouge_l_f1"] * 2
    assert list(table["answer_prefix"]) == ["Answer:"] * 2


def test_masks_are_a_mapping(tmp_path):
    question = "<mask-0> built a mill in <mask-1>."
    new = {"context": MILL, "question": question, "answer": list(MASKS.values())}
    pairs = str([{"Q": question, "A": MASKS, "S": "..."}])
    old = {"input": MILL, "title": "Mill", "qa_pairs": pairs, "output": "none"}
    write(tmp_path, "shortdep_cloze.jsonl", new, old)
    table = load("shortdep_cloze", str(tmp_path))
    assert [json.loads(answer) for (answer,) in table["answer"]] == [MASKS, MASKS]
    assert f"\nPassage: {question}\n" in table["question"][0]
    assert "{'<mask-0>': 'Ada', '<mask-1>': 'The River Post'" in table["question"][0]
    assert list(table["metric"]) == ["loogle_exact_match"] * 2
    assert list(table["max_new_tokens"]) == [50, 50]


@pytest.mark.parametrize(
    ("file", "row"),
    [
        ("summarization.jsonl", {"context": MILL, "question": "...", "answer": "A mill."}),
        (
            "longdep_summarization.jsonl",
            {"input": MILL, "title": "1", "qa_pairs": "none", "output": "A mill."},
        ),
    ],
)
def test_a_summary(tmp_path, file, row):
    write(tmp_path, file, row)
    table = load("summarization", str(tmp_path))
    assert table["answer"][0] == ["A mill."]
    assert table["question"][0] == "\n\nWrite a summary of this paper.\n"
    assert (table["answer_prefix"][0], table["max_new_tokens"][0]) == ("Summary:", 500)


def test_from_the_hub(tmp_path, monkeypatch):
    write(tmp_path, "data/longdep_qa.jsonl", {"context": MILL, "question": "Who?", "answer": "A"})
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load("longdep_qa", None)["answer"][0] == ["A"]
    assert asked == [("bigai-nlco/LooGLE", "data/longdep_qa.jsonl", "dataset")]


@pytest.mark.parametrize(
    ("task", "member"),
    [
        ("longdep_qa", "LooGLE/data/longdep_qa.jsonl"),
        ("summarization", "longdep_summarization.jsonl"),
    ],
)
def test_from_the_archive_that_the_hub_had_before(tmp_path, monkeypatch, task, member):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as files:
        row = {"context": MILL, "question": "Who?", "answer": "A"}
        files.writestr(member, f"{json.dumps(row)}\n")

    def download(repository, name, repo_type):
        if name != "data.zip":
            raise FileNotFoundError(name)
        return str(archive)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load(task, None)["answer"][0] == ["A"]
    files = r"data/shortdep_qa\.jsonl or data\.zip of bigai-nlco/LooGLE \(FileNotFoundError\)"
    with pytest.raises(cp.CachepressError, match=files):
        load("shortdep_qa", None)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("longdep_qa", {"context": MILL, "question": "Who?"}, "longdep_qa.jsonl is not in LooGLE"),
        ("longdep_qa", {"input": MILL, "qa_pairs": "[{'Q': "}, "not in LooGLE's format"),
        ("shortdep_qa", {"input": MILL, "qa_pairs": "[exit(1)]"}, "not in LooGLE's format"),
        ("shortdep_cloze", {"context": MILL, "question": "x", "answer": "A"}, "the masks are 'A'"),
    ],
)
def test_another_format_is_one_clear_line(tmp_path, task, row, message):
    write(tmp_path, f"{task}.jsonl", row)
    with pytest.raises(cp.CachepressError, match=message) as caught:
        load(task, str(tmp_path))
    assert "\n" not in str(caught.value)
