"""ZeroSCROLLS in its original format, from a folder and from an archive; and a submission."""

import io
import json
import zipfile

import huggingface_hub
import pandas as pd
import pytest

import cachepress as cp
from cachepress.evaluation import EvaluationConfig, EvaluationRunner
from cachepress.evaluation.tasks.zero_scrolls import ZERO_SCROLLS, write_submission

BEFORE = "Read the article and answer.\n\nArticle:\nThe mill stands by the river."
QUERY = "\n\nQuestion:\nWhere is the mill?"
AFTER = "\n\nAnswer:\n"


def sample(key, query=QUERY, after=AFTER, **other):
    return {
        "id": key,
        "pid": f"{key}_0",
        "input": BEFORE + query + after,
        "output": None,
        "document_start_index": BEFORE.index("The mill"),
        "document_end_index": len(BEFORE),
        "query_start_index": len(BEFORE) + 2,
        "query_end_index": len(BEFORE + query),
        "truncation_seperator": "... [The rest is left out]",
        **other,
    }


def lines(*rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def write(folder, task, *rows):
    (folder / task).mkdir()
    (folder / task / "test.jsonl").write_text(lines(*rows))


def load(task, folder):
    config = EvaluationConfig(dataset="zero_scrolls", data_dir=task, data_path=folder)
    return ZERO_SCROLLS.table(config, None)


def test_the_prompt_is_split_at_the_end_of_the_document(tmp_path):
    write(tmp_path, "qasper", sample("a"), sample("b", "\n\nQuestion:\nWhose?"))
    table = load("qasper", str(tmp_path))
    assert list(table["context"]) == [BEFORE, BEFORE]
    assert list(table["question"]) == [f"{QUERY}\n\n", "\n\nQuestion:\nWhose?\n\n"]
    assert list(table["answer_prefix"]) == ["Answer:", "Answer:"]
    assert list(table["answer"]) == [["a"], ["b"]]
    assert list(table["metric"]) == ["unscored", "unscored"]
    assert list(table["task"]) == ["qasper", "qasper"]
    assert list(table["max_new_tokens"]) == [128, 128]


def test_without_a_query_only_the_beginning_of_the_answer_is_left(tmp_path):
    end = {"query_start_index": len(BEFORE), "query_end_index": len(BEFORE)}
    write(tmp_path, "gov_report", sample("a", "", "\n\nSummary:\n", **end))
    row = load("gov_report", str(tmp_path)).iloc[0]
    assert (row["context"], row["question"], row["answer_prefix"]) == (BEFORE, "\n\n", "Summary:")
    assert row["max_new_tokens"] == 1024


def test_a_sample_with_several_references_is_one_row(tmp_path):
    rows = [sample("a", output="by it"), sample("b"), sample("a", output="at the river")]
    write(tmp_path, "squality", *rows)
    assert list(load("squality", str(tmp_path))["answer"]) == [["a"], ["b"]]


def test_from_the_archive_that_the_hub_serves(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "musique.zip", "w") as files:
        files.writestr("musique/validation.jsonl", lines(sample("no")))
        files.writestr("musique/test.jsonl", lines(sample("2hop__1_2")))
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert list(load("musique", None)["answer"]) == [["2hop__1_2"]]
    assert asked == [("tau/zero_scrolls", "musique.zip", "dataset")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document_end_index": 9999}, "test.jsonl is not in ZeroSCROLLS' format: .* ends at 9999"),
        ({"document_end_index": None}, "qasper/test.jsonl is not in ZeroSCROLLS' format"),
        ({"input": ""}, "the document ends at"),
        ({"id": ["a"]}, "not in ZeroSCROLLS' format"),
    ],
)
def test_another_format_is_one_clear_line(tmp_path, change, message):
    write(tmp_path, "qasper", sample("a") | change)
    with pytest.raises(cp.CachepressError, match=message) as caught:
        load("qasper", str(tmp_path))
    assert "\n" not in str(caught.value)


def predictions(tmp_path):
    write(tmp_path, "qasper", sample("a"), sample("b"))
    write(tmp_path, "quality", sample("c"))
    tables = [load(task, str(tmp_path)) for task in ("qasper", "quality")]
    texts = ["by the river", "NA", "Größe"]
    return pd.concat(tables, ignore_index=True).assign(predicted_answer=texts)


def test_a_submission_has_a_file_for_each_task(tmp_path):
    paths = write_submission(predictions(tmp_path), tmp_path / "out")
    assert [path.name for path in paths] == ["qasper.json", "quality.json"]
    written = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    assert written == [{"a": "by the river", "b": "NA"}, {"c": "Größe"}]


@pytest.mark.parametrize(
    ("texts", "wrong"), [(["by the river", "NA", ""], "b is nan"), (["1", "02", "3"], "a is .*1")]
)
def test_a_submission_from_a_saved_table(tmp_path, texts, wrong):
    table = predictions(tmp_path).assign(predicted_answer=texts)
    saved = io.StringIO(table.assign(answer=[json.dumps(a) for a in table["answer"]]).to_csv())
    strict = pd.read_csv(saved, dtype=str, keep_default_na=False)
    paths = write_submission(strict, tmp_path / "out")
    assert json.loads(paths[0].read_text()) == {"a": texts[0], "b": texts[1]}
    assert json.loads(paths[1].read_text()) == {"c": texts[2]}
    saved.seek(0)
    message = f"the prediction of sample {wrong}.*: read .* dtype=str and keep_default_na=False"
    with pytest.raises(cp.CachepressError, match=message):
        write_submission(pd.read_csv(saved), tmp_path / "out")


def test_a_submission_of_other_predictions_is_refused(tmp_path):
    table = predictions(tmp_path)
    twice = pd.concat([table, table[:1]])
    with pytest.raises(cp.CachepressError, match="qasper: two predictions are of sample a"):
        write_submission(twice, tmp_path)
    with pytest.raises(cp.CachepressError, match="has no task 'qasper_e'"):
        write_submission(table.assign(task="qasper_e"), tmp_path)
    with pytest.raises(cp.CachepressError, match="the answer .* is not the id of a sample"):
        write_submission(table.assign(answer=[["a", "b"], ["c"], ["d"]]), tmp_path)


def test_a_run_leaves_a_submission_and_no_score(tmp_path, model_dir):
    write(tmp_path, "qasper", sample("a"), sample("b", "\n\nQuestion:\nWhose?"))
    config = EvaluationConfig(
        dataset="zero_scrolls",
        data_dir="qasper",
        data_path=str(tmp_path),
        model=model_dir,
        device="cpu",
        max_new_tokens=3,
        output_dir=str(tmp_path / "out"),
    )
    runner = EvaluationRunner(config, quiet=True)
    metrics = runner.run_evaluation()
    assert (metrics["score"], metrics["tasks"]) == (None, {})
    table = pd.read_csv(runner.results_dir / "predictions.csv", dtype=str, keep_default_na=False)
    submitted = json.loads((runner.results_dir / "submission" / "qasper.json").read_text())
    assert submitted == dict(zip("ab", table["predicted_answer"], strict=True))
