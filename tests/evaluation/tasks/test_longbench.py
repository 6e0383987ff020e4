"""LongBench-E in its original format, from a local folder and from an archive like the hub's."""

import json
import zipfile

import huggingface_hub
import pytest

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.tasks.longbench import LONGBENCH_E

ROW = {
    "input": "Who wrote it?",
    "context": "Passage 1:\nIt was written by Ada.",
    "answers": ["Ada", "Ada Lovelace"],
    "length": 7,
    "dataset": "hotpotqa_e",
    "language": "en",
    "all_classes": None,
    "_id": "0",
}


def load(task, folder):
    config = EvaluationConfig(dataset="longbench-e", data_dir=task, data_path=folder)
    return LONGBENCH_E.table(config, None)


def check(table):
    assert list(table["answer"]) == [["Ada", "Ada Lovelace"]] * 2
    assert table["context"][0].endswith("Passage 1:\nIt was written by Ada.")
    assert table["question"][0].endswith("Question: Who wrote it?")
    assert list(table["max_new_tokens"]) == [32, 32]
    assert list(table["task"]) == ["hotpotqa_e"] * 2


def test_from_a_local_folder(tmp_path):
    (tmp_path / "hotpotqa_e.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n")
    check(load("hotpotqa_e", str(tmp_path)))


def test_from_the_archive_that_the_hub_serves(tmp_path, monkeypatch):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("data/hotpotqa_e.jsonl", f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n")
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(archive)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    check(load("hotpotqa_e", None))
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("narrativeqa", "", "got data_dir='narrativeqa', wanted one of"),
        (None, "", "got data_dir=None"),
        ("qasper_e", None, "has no file qasper_e.jsonl"),
        ("qasper_e", "{broken", "qasper_e.jsonl is damaged"),
        ("qasper_e", '{"input": "x"}\n', "not in LongBench's format"),
        ("qasper_e", "", "has no rows"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(tmp_path, task, text, message):
    if text is not None:
        (tmp_path / "qasper_e.jsonl").write_text(text)
    with pytest.raises(cp.CachepressError, match=message) as caught:
        load(task, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_without_the_hub_the_way_out_is_named(monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(cp.CachepressError, match="--data-path"):
        load("qasper_e", None)
