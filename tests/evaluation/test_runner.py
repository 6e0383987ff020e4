"""The run: nothing is computed twice, nothing is lost, and files say what was measured.

Answers that are computed twice are computed by the same process with the same threads, and each
context by itself, in the same shapes: they are the same to the last bit, whatever the machine.
"""

import csv
import json

import pandas as pd
import pytest
import yaml

import cachepress as cp
from cachepress.evaluation import EvaluationConfig, EvaluationRunner, executors
from cachepress.evaluation.answering import Answerer
from cachepress.evaluation.run import CONFIG, METRICS, PREDICTIONS, RECORDS


@pytest.fixture
def config(model_dir, data_file, tmp_path):
    return {
        "dataset": data_file,
        "model": model_dir,
        "press": "knorm",
        "compression_ratio": 0.5,
        "output_dir": str(tmp_path),
        "device": "cpu",
    }


def run(config, **options):
    runner = EvaluationRunner(EvaluationConfig(**{**config, **options}), quiet=True)
    return runner, runner.run_evaluation()


def test_files_and_what_they_say(config, data_file):
    runner, metrics = run(config)
    folder = runner.results_dir
    assert folder.name == "facts__tiny-llama__knorm__0.50"
    rows = list(csv.DictReader((folder / PREDICTIONS).open()))
    assert list(rows[0]) == [
        "sample_id",
        "question",
        "answer",
        "answer_prefix",
        "max_new_tokens",
        "task",
        "metric",
        "choices",
        "length",
        "depth",
        "context_id",
        "predicted_answer",
        "kl",
        "score",
        "compression_ratio",
    ]
    assert [row["sample_id"] for row in rows] == list(map(str, range(8)))
    assert {row["compression_ratio"] for row in rows} == {"0.5"}
    assert json.loads(rows[1]["answer"]) == ["w11", "w7"]
    assert [len(row["predicted_answer"].split()) for row in rows] == [4, 5] * 4
    assert metrics == json.loads((folder / METRICS).read_text())
    assert (metrics["score"]["samples"], metrics["score"]["contexts"]) == (8, 4)
    assert set(metrics["tasks"]) == {"easy", "hard"}
    assert metrics["compression_ratio"] == 0.5
    assert metrics["cache_bytes_after"] < metrics["cache_bytes_before"]
    assert metrics["context_tokens"] == 42
    assert metrics["prefill_seconds"] > 0 and metrics["decode_tokens_per_second"] > 0
    assert metrics["peak_memory_bytes"] > 10**7
    saved = yaml.safe_load((folder / CONFIG).read_text())
    assert saved["press"] == "KnormPress(compression_ratio=0.5)"
    assert saved["dataset"] == data_file
    assert saved["cachepress_version"] == cp.__version__


def test_scores_are_the_share_of_answers_found(config, tmp_path):
    runner, metrics = run(config)
    table = pd.read_csv(runner.results_dir / PREDICTIONS)
    wanted = [
        sum(a in prediction for a in json.loads(answers)) / 2
        for answers, prediction in zip(table["answer"], table["predicted_answer"], strict=True)
    ]
    assert metrics["score"]["mean"] == pytest.approx(sum(wanted) / 8)


def test_a_finished_run_is_skipped_and_overwrite_redoes_it(config, monkeypatch, caplog):
    runner, first = run(config)
    before = (runner.results_dir / PREDICTIONS).read_bytes()
    monkeypatch.setattr(executors, "load", refuse)
    with caplog.at_level("INFO"):
        _, again = run(config)
    assert again == first
    assert "already done" in caplog.text
    monkeypatch.undo()
    run(config, overwrite=True)
    assert (runner.results_dir / PREDICTIONS).read_bytes() == before


def refuse(*args):
    raise AssertionError("this must not be computed again")


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_a_killed_run_goes_on_where_it_was(config, monkeypatch, tmp_path, stop_after):
    whole, _ = run(config, output_dir=str(tmp_path / "whole"))
    answered = []
    answer = Answerer.alone

    def stopping(self, run, context):
        if len(answered) == stop_after:
            raise KeyboardInterrupt
        answered.append(context)
        return answer(self, run, context)

    monkeypatch.setattr(Answerer, "alone", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    folder = EvaluationConfig(**config).get_results_dir()
    assert not (folder / METRICS).exists()
    half = (folder / RECORDS).read_bytes() if stop_after else b""
    folder.mkdir(exist_ok=True)  # An interrupt before the first answer leaves none, a kill does.
    (folder / RECORDS).write_bytes(half + b'{"key": "torn')

    monkeypatch.setattr(Answerer, "alone", counting(answered, answer))
    run(config)
    assert len(answered) == len(set(answered)) == 4
    assert (folder / PREDICTIONS).read_bytes() == (whole.results_dir / PREDICTIONS).read_bytes()


def counting(answered, answer):
    def count(self, run, context):
        answered.append(context)
        return answer(self, run, context)

    return count


def test_another_config_in_the_same_folder_is_refused_by_field(config):
    runner, _ = run(config)
    path = runner.results_dir / CONFIG
    path.write_text(path.read_text().replace("seed: 0", "seed: 5"))
    with pytest.raises(cp.CachepressError, match="has seed=5 but this run has 0.*--overwrite"):
        run(config)


def test_two_runs_at_once_in_one_folder_are_refused(config):
    from filelock import FileLock

    runner = EvaluationRunner(EvaluationConfig(**config), quiet=True)
    runner.results_dir.mkdir(parents=True)
    with (
        FileLock(runner.results_dir / ".lock"),
        pytest.raises(cp.CachepressError, match="another run is writing"),
    ):
        runner.run_evaluation()


def test_fraction_takes_whole_contexts(config):
    runner, metrics = run(config, fraction=0.5)
    assert (metrics["score"]["samples"], metrics["score"]["contexts"]) == (4, 2)
    again, _ = run(config, fraction=0.5, overwrite=True)
    rows = [
        [row["sample_id"] for row in csv.DictReader((r.results_dir / PREDICTIONS).open())]
        for r in (runner, again)
    ]
    assert rows[0] == rows[1]


def test_query_aware_shows_the_question_to_the_press(config):
    runner, metrics = run(config, query_aware=True)
    assert (metrics["query_aware"], metrics["score"]["contexts"]) == (True, 8)
    rows = list(csv.DictReader((runner.results_dir / PREDICTIONS).open()))
    assert {row["question"] for row in rows} == {""}
    assert all(row["predicted_answer"] for row in rows)
    assert metrics["context_tokens"] == 45


def test_no_press_is_an_ordinary_cache(config):
    _, metrics = run(config, press="no_press", compression_ratio=None)
    assert metrics["compression_ratio"] == 0
    assert metrics["cache_bytes_before"] == metrics["cache_bytes_after"] == 42 * 2 * 4 * 2 * 8 * 4


def test_max_new_tokens_overrides_the_data(config):
    runner, _ = run(config, max_new_tokens=2)
    rows = list(csv.DictReader((runner.results_dir / PREDICTIONS).open()))
    assert {len(row["predicted_answer"].split()) for row in rows} == {2}


def test_a_context_beyond_the_limit_is_refused_before_any_work(config, monkeypatch):
    monkeypatch.setattr(Answerer, "alone", refuse)
    with pytest.raises(cp.CachepressError, match="sample 0: the context has 42 tokens"):
        run(config, max_context_length=30)


def test_a_longer_context_is_cut_when_asked(config, caplog):
    with caplog.at_level("WARNING"):
        _, metrics = run(config, max_context_length=30, truncation=True)
    assert metrics["context_tokens"] == 30
    assert caplog.text.count("context cut from 42 to 30") == 4
    assert "4 of 4 contexts are cut, by 48 tokens in all" in caplog.text
    assert (metrics["cut_contexts"], metrics["cut_tokens"]) == (4, 48)


def test_every_record_says_how_many_tokens_were_cut(config):
    runner, metrics = run(config)
    assert (metrics["cut_contexts"], metrics["cut_tokens"]) == (0, 0)
    lines = (runner.results_dir / RECORDS).read_text().splitlines()
    assert [json.loads(line)["cut_tokens"] for line in lines] == [0] * 8
    runner, metrics = run(config, max_context_length=30, truncation="middle")
    assert runner.results_dir.name.endswith("__max_context_length30__truncation-middle")
    lines = (runner.results_dir / RECORDS).read_text().splitlines()
    assert [json.loads(line)["cut_tokens"] for line in lines] == [12] * 8
    assert (metrics["cut_contexts"], metrics["cut_tokens"]) == (4, 48)


def test_where_a_context_is_cut_changes_the_answer(config):
    options = {"max_context_length": 20, "press": "no_press", "compression_ratio": None}
    found = [
        run(config, truncation=way, **options)[0].results_dir / PREDICTIONS
        for way in ("end", "middle")
    ]
    assert found[0].read_bytes() != found[1].read_bytes()
    plain, _ = run(config, **{**options, "max_context_length": None}, chat=False)
    assert plain.results_dir.name.endswith("__0.00__no-chat")
    assert yaml.safe_load((plain.results_dir / CONFIG).read_text())["chat"] is False


def test_records_that_do_not_say_what_was_cut_are_read(config):
    runner, metrics = run(config)
    path = runner.results_dir / RECORDS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["cut_tokens"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, again = run(config)
    assert again == {**metrics, "cut_contexts": None, "cut_tokens": None}


def test_the_run_has_its_old_name_too(config):
    runner = EvaluationRunner(EvaluationConfig(**config))
    with pytest.warns(DeprecationWarning, match="EvaluationRunner.cell is called run since"):
        assert runner.cell is runner.run
    assert runner.run.folder == runner.results_dir
