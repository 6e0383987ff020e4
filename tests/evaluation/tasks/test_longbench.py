"""LongBench in its original format, from a folder and from an archive like the hub's."""

# ruff: noqa: RUF001 (Chinese texts have Chinese punctuation)

import json
import zipfile

import huggingface_hub
import pytest

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.tasks.longbench import LONGBENCH, LONGBENCH_E

ROW = {
    "input": "Who {wrote} it?",
    "context": "Passage 1:\nIt was written by {Ada}.",
    "answers": ["Ada", "Ada Lovelace"],
    "length": 7,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "0",
}
CLASSES = ["sport", "sports", "sports car"]
ASKED = {
    "narrativeqa": ("\n\nQuestion: Who {wrote} it?\n\n", "Answer:", 128, "qa_f1"),
    "qasper": ("\n\nQuestion: Who {wrote} it?\n\n", "Answer:", 128, "qa_f1"),
    "multifieldqa_en": ("\n\nQuestion: Who {wrote} it?\n", "Answer:", 64, "qa_f1"),
    "multifieldqa_zh": ("\n\n问题：Who {wrote} it?\n", "回答：", 64, "longbench_qa_f1_zh"),
    "hotpotqa": ("\n\nQuestion: Who {wrote} it?\n", "Answer:", 32, "qa_f1"),
    "2wikimqa": ("\n\nQuestion: Who {wrote} it?\n", "Answer:", 32, "qa_f1"),
    "musique": ("\n\nQuestion: Who {wrote} it?\n", "Answer:", 32, "qa_f1"),
    "dureader": ("\n\n问题：Who {wrote} it?\n", "回答：", 128, "longbench_rouge_zh"),
    "gov_report": ("on one page.\n\n", "Summary:", 512, "longbench_rouge"),
    "qmsum": ("\n\nQuery: Who {wrote} it?\n", "Answer:", 512, "longbench_rouge"),
    "multi_news": ("all the news on one page.\n\n", "Summary:", 512, "longbench_rouge"),
    "vcsum": ("总结会议的内容。\n\n", "会议总结：", 512, "longbench_rouge_zh"),
    "trec": ("Question: Who?\n", "Type:", 64, "longbench_classification"),
    "triviaqa": ("Passage:\nBy Ada.\nQuestion:\nWho?\n", "Answer:", 32, "longbench_qa_f1_line"),
    "samsum": ("Dialogue: Ann: Hi!\nBob: Hi!\n", "Summary:", 128, "longbench_rouge_line"),
    "lsht": ("新闻内容：\n足球\n", "类别：", 64, "longbench_classification"),
    "passage_count": ("such as 1, 2 or 3.\n\n", "The number is:", 32, "longbench_count"),
    "passage_retrieval_en": (
        '"Paragraph 2" and so on.\n\n',
        "The answer is:",
        32,
        "longbench_retrieval",
    ),
    "passage_retrieval_zh": ("“段落2”等。\n\n", "答案是：", 32, "longbench_retrieval_zh"),
    "lcc": ("", "The next line of the code:\n", 64, "longbench_code_similarity"),
    "repobench-p": (
        "Who {wrote} it?",
        "The next line of the code:\n",
        64,
        "longbench_code_similarity",
    ),
}
FEW_SHOT = ("trec", "triviaqa", "samsum", "lsht")


def row_of(task):
    """A row of a task; where examples come first, its input ends with the answer's first words."""
    question, prefix, _, metric = ASKED[task]
    asked = question + prefix if task in FEW_SHOT else ROW["input"]
    return ROW | {"input": asked, "all_classes": CLASSES if "classi" in metric else None}


def load(benchmark, task, folder):
    config = EvaluationConfig(dataset=benchmark.name, data_dir=task, data_path=folder)
    return benchmark.table(config, None)


def check(row, task):
    question, prefix, limit, metric = ASKED[task.removesuffix("_e")]
    assert row["context"].endswith("Passage 1:\nIt was written by {Ada}.")
    assert row["question"].endswith(question)
    assert row["answer_prefix"] == prefix
    assert row["answer"] == ["Ada", "Ada Lovelace"]
    assert row["max_new_tokens"] == limit
    assert row["metric"] == metric
    assert row["choices"] == (CLASSES if metric == "longbench_classification" else [])
    assert row["length"] == 7
    assert row["task"] == (f"{task} 0-4k" if task.endswith("_e") else task)


@pytest.mark.parametrize("folder", [".", "data"])
@pytest.mark.parametrize("task", ASKED)
def test_each_task_from_a_local_folder(tmp_path, task, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / f"{task}.jsonl").write_text(f"{json.dumps(row_of(task))}\n" * 2)
    table = load(LONGBENCH, task, str(tmp_path))
    assert len(table) == 2
    check(table.iloc[1], task)
    assert table["metric"][0] in LONGBENCH.metrics


def test_few_shot_questions_begin_where_the_examples_end(tmp_path):
    for task in FEW_SHOT:
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(row_of(task)) + "\n")
        question = load(LONGBENCH, task, str(tmp_path))["question"][0]
        assert question.lstrip("\n") == ASKED[task][0]
    no_cue = ROW | {"input": "Dialogue: Ann: Hi!"}
    (tmp_path / "samsum.jsonl").write_text(json.dumps(no_cue) + "\n")
    row = load(LONGBENCH, "samsum", str(tmp_path)).iloc[0]
    assert row["question"] == "\n\nDialogue: Ann: Hi!"
    assert row["answer_prefix"] == ""


def test_parts_are_the_tasks_of_the_benchmark():
    assert LONGBENCH.parts == tuple(ASKED)
    assert len(LONGBENCH.parts) == 21
    assert len(LONGBENCH_E.parts) == 13
    chinese = ["multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"]
    long = ["narrativeqa", "musique", "qmsum"]
    missing = {f"{task}_e" for task in ASKED} - set(LONGBENCH_E.parts)
    assert missing == {f"{task}_e" for task in chinese + long}


@pytest.mark.parametrize("task", LONGBENCH_E.parts)
def test_the_e_set_asks_the_same(tmp_path, task):
    row = row_of(task.removesuffix("_e"))
    (tmp_path / f"{task}.jsonl").write_text(f"{json.dumps(row)}\n")
    table = load(LONGBENCH_E, task, str(tmp_path))
    check(table.iloc[0], task)
    assert table["metric"][0] in LONGBENCH_E.metrics
    with pytest.raises(cp.CachepressError, match="longbench: got data_dir="):
        load(LONGBENCH, task, str(tmp_path))


def test_the_e_set_is_scored_by_length(tmp_path):
    lengths = [3999, 4000, 7999, 8000]
    rows = [row_of("qasper") | {"length": length} for length in lengths]
    (tmp_path / "qasper_e.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tasks = load(LONGBENCH_E, "qasper_e", str(tmp_path))["task"].tolist()
    assert tasks == ["qasper_e 0-4k", "qasper_e 4-8k", "qasper_e 4-8k", "qasper_e 8k+"]


def test_from_the_archive_that_the_hub_serves(tmp_path, monkeypatch):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("data/hotpotqa_e.jsonl", f"{json.dumps(ROW)}\n")
        files.writestr("data/lsht.jsonl", f"{json.dumps(row_of('lsht'))}\n")
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(archive)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    check(load(LONGBENCH_E, "hotpotqa_e", None).iloc[0], "hotpotqa_e")
    check(load(LONGBENCH, "lsht", None).iloc[0], "lsht")
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")] * 2


SCORES = [
    ("hotpotqa", "The Ada, of London", ["Ada Lovelace", "Lovelace"], None, 0.4),
    ("triviaqa", "\nAda\nPassage: it", ["Ada", "x"], None, 1.0),
    ("triviaqa", "by\nAda", ["Ada"], None, 0.0),
    ("multifieldqa_zh", "他写了《红楼梦》。", ["曹雪芹写了红楼梦"], None, 0.6666666666666665),
    ("multifieldqa_zh", "，。！", ["，。！"], None, 0.0),
    (
        "gov_report",
        "The report says. The law was new.",
        ["The law of the report was new."],
        None,
        0.7692307642603551,
    ),
    ("gov_report", "...", ["The law."], None, 0.0),
    ("gov_report", "", ["The law."], None, 0.0),
    (
        "samsum",
        "Ann meets Bob today.\n\nDialogue: x",
        ["Ann will meet Bob today."],
        None,
        0.6666666617283951,
    ),
    (
        "vcsum",
        "会议讨论了经济发展问题。",
        ["本次会议讨论经济问题，以及体育。"],
        None,
        0.6249999950781252,
    ),
    ("trec", "sports car or sport", ["sports car"], CLASSES, 0.5),
    ("trec", "sports car or sport", ["sports car"], ["sport", "car", "sports car"], 0.5),
    ("trec", "sports\nsports car", ["sports car", "sports"], CLASSES, 1.0),
    ("lsht", "体育新闻", ["体育"], ["经济", "体育", "新闻"], 0.5),
    ("trec", "none", ["sport"], CLASSES, 0.0),
    ("passage_count", "There are 12, or 7 of 12.", ["12"], None, 0.6666666666666666),
    ("passage_count", "many", ["12"], None, 0.0),
    ("passage_retrieval_en", "Paragraph 1 or 11", ["Paragraph 1"], None, 0.5),
    ("passage_retrieval_zh", "段落12", ["段落12"], None, 1.0),
    ("lcc", "\n```python\n# next\n  return x + 1\n", ["  return x + y"], None, 0.93),
    ("lcc", "`only`", ["  return x"], None, 0.0),
    ("repobench-p", "a = self.b(c)", ["a = self.d(c)", "a = self.b(c)"], None, 1.0),
]


@pytest.mark.parametrize(("task", "prediction", "answers", "classes", "score"), SCORES)
def test_scores_are_those_of_the_benchmark(task, prediction, answers, classes, score):
    metric = LONGBENCH.metrics[ASKED[task][3]]
    assert metric(prediction, answers, classes or []) == score


@pytest.mark.parametrize("name", ["longbench_rouge", "longbench_rouge_line"])
def test_a_sentence_of_any_length_is_scored(name):
    words = [f"w{number}" for number in range(1500)]
    wanted = " ".join(words)
    assert LONGBENCH.metrics[name](wanted, [wanted], []) == pytest.approx(1)
    half = " ".join(words[::2])
    assert LONGBENCH.metrics[name](half, [wanted], []) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("narrativeqa", "", "got data_dir='narrativeqa', wanted one of"),
        (None, "", "got data_dir=None"),
        ("qasper_e", None, "has no file qasper_e.jsonl"),
        ("qasper_e", "{broken", "qasper_e.jsonl is damaged"),
        ("qasper_e", '{"input": "x"}\n', "not in LongBench's format"),
        ("qasper_e", json.dumps(ROW | {"context": 3}), "not in LongBench's format"),
        ("trec_e", json.dumps(ROW), "trec_e.jsonl is not in LongBench's format: .*no classes"),
        ("qasper_e", "", "has no rows"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(tmp_path, task, text, message):
    if text is not None:
        (tmp_path / f"{task}.jsonl").write_text(text)
    with pytest.raises(cp.CachepressError, match=message) as caught:
        load(LONGBENCH_E, task, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_without_the_hub_the_way_out_is_named(monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(cp.CachepressError, match="--data-path"):
        load(LONGBENCH_E, "qasper_e", None)
