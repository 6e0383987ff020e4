"""Which metric judges: each sample's own, its benchmark's, or the one that is asked for."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import cachepress as cp
from cachepress.cli import main
from cachepress.evaluation import EvaluationConfig, EvaluationRunner, executors
from cachepress.evaluation.answering import Answerer
from cachepress.evaluation.predictions import read_predictions
from cachepress.evaluation.registry import METRIC_REGISTRY, check_metric
from cachepress.evaluation.rescore import score_again
from cachepress.evaluation.run import METRICS, PREDICTIONS, RECORDS
from cachepress.evaluation.samples import load_table
from cachepress.evaluation.sweep import load_sweep, run_sweep
from cachepress.pages.report import write_report

MIXED = ["string_match", "qa_f1", "ruler_part", "string_match"]


@pytest.fixture
def mixed(tmp_path, data_file):
    """Four samples with metrics of their own."""
    rows = [json.loads(line) for line in Path(data_file).read_text().splitlines()[:4]]
    path = tmp_path / "mixed.jsonl"
    lines = [json.dumps({**r, "metric": m}) + "\n" for r, m in zip(rows, MIXED, strict=True)]
    path.write_text("".join(lines))
    return path


@pytest.fixture
def config(model_dir, mixed, tmp_path):
    return {
        "dataset": str(mixed),
        "model": model_dir,
        "press": "knorm",
        "compression_ratio": 0.5,
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
    }


def run(config, **options):
    runner = EvaluationRunner(EvaluationConfig(**{**config, **options}), quiet=True)
    return runner.results_dir, runner.run_evaluation()


def refuse(*args, **options):
    raise AssertionError("this must not be computed")


def test_score_without_a_metric_restores_each_samples_own(config):
    folder, first = run(config)
    before = (folder / PREDICTIONS).read_bytes()
    assert first["metrics"] == ["qa_f1", "ruler_part", "string_match"]
    for metric in ("infinitebench_character_f1", "qa_f1"):
        ((_, other),) = score_again(folder, metric)
        assert other.metrics == [metric]
        rows = read_predictions(folder / PREDICTIONS)
        assert set(rows["metric"]) == {metric}
        assert list(rows["own_metric"]) == MIXED
    ((_, again),) = score_again(folder)
    assert again.to_json() == first
    assert (folder / PREDICTIONS).read_bytes() == before


def test_score_of_a_table_of_0_1_0_keeps_its_metrics(config):
    folder, first = run(config)
    rows = read_predictions(folder / PREDICTIONS).drop(columns="own_metric")
    rows.to_csv(folder / PREDICTIONS, index=False, lineterminator="\n")
    score_again(folder, "qa_f1")
    ((_, again),) = score_again(folder)
    assert again.to_json() == first


def test_evaluate_with_a_metric_judges_old_answers_by_it(config, monkeypatch):
    folder, first = run(config)
    records = (folder / RECORDS).read_bytes()
    monkeypatch.setattr(executors, "load", refuse)
    same, other = run(config, metric="qa_f1")
    assert (same, other["metrics"]) == (folder, ["qa_f1"])
    scores = [float(row["score"]) for row in csv.DictReader((folder / PREDICTIONS).open())]
    rows = read_predictions(folder / PREDICTIONS)
    wanted = [
        METRIC_REGISTRY["qa_f1"](prediction, json.loads(answer), [])
        for prediction, answer in zip(rows["predicted_answer"], rows["answer"], strict=True)
    ]
    assert scores == pytest.approx(wanted)
    _, again = run(config)
    assert again == first
    assert (folder / RECORDS).read_bytes() == records


def test_a_sweep_with_a_metric_judges_all_by_it(config, mixed, tmp_path):
    options = {
        "models": [config["model"]],
        "datasets": [str(mixed)],
        "presses": ["knorm"],
        "ratios": [0.5],
        "metric": "qa_f1",
        "output_dir": str(tmp_path / "swept"),
        "device": "cpu",
    }
    (results,) = run_sweep(load_sweep(None, options), quiet=True)
    assert [result.metrics.metrics for result in results] == [["qa_f1"]] * 2
    assert load_sweep(None, {"metric": "qa_f1"}).options == {"metric": "qa_f1"}


@pytest.mark.parametrize(
    ("answer", "columns", "metric", "wanted"),
    [
        ("x", {}, "infinitebench_function", "two texts, what the right option says"),
        ("x", {}, "longbench_v2_choice", "a letter from A to D"),
        ("E", {}, "infinitebench_choice", "a letter from A to D"),
        ("x", {}, "infinitebench_value", "a number"),
        ("1.5", {}, "infinitebench_last_number", "a whole number"),
        ("-5", {}, "infinitebench_first_number", "a whole number"),
        (["1", "x"], {}, "infinitebench_leading_numbers", "whole numbers"),
        ("x", {}, "longbench_count", "a whole number"),
        ("Page 3", {}, "longbench_retrieval", 'an answer such as "Paragraph 1"'),
        ("x", {}, "longbench_classification", 'a column "choices" or "all_classes"'),
        ("x", {"choices": ["y"]}, "scbench_function_go", "the answer among them"),
        ("x", {}, "scbench_value", "a number"),
        ("x", {}, "loogle_exact_match", "a mapping from masks to names in JSON"),
        ('{"a": 1}', {}, "loogle_partial_match", "a mapping from masks to names in JSON"),
        ("x", {}, "boxed_integer", "a whole number"),
        ("x", {}, "nonsense", "unknown metric 'nonsense'"),
    ],
)
@pytest.mark.parametrize("way", ["column", "option", "score"])
def test_a_metric_that_does_not_fit_is_refused_before_anything_is_computed(
    config, tmp_path, monkeypatch, capsys, way, answer, columns, metric, wanted
):
    data = tmp_path / "t.jsonl"
    row = {"context": "w3 w4 w5 w6", "question": "w9", "max_new_tokens": 1, "answer": "w1"}
    odd = {**row, **columns, "answer": answer}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in config.items()]
    command = ["evaluate", *arguments, f"--dataset={data}"]
    if way == "score":
        data.write_text(json.dumps(odd))
        assert main(command) == 0
        before = (next((tmp_path / "out").iterdir()) / PREDICTIONS).read_bytes()
        command = ["score", str(tmp_path / "out"), f"--metric={metric}"]
    elif way == "column":
        odd["metric"] = metric
        data.write_text(json.dumps(row) + "\n" + json.dumps(odd))
    else:
        data.write_text(json.dumps(odd))
        command.append(f"--metric={metric}")
    monkeypatch.setattr(executors, "load", refuse)
    capsys.readouterr()
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert wanted in line
    if metric in METRIC_REGISTRY:
        assert f"metric {metric!r} does not fit the answer" in line
        assert f"sample {'1' if way == 'column' else '0'}: " in line
    if way == "score":
        assert (next((tmp_path / "out").iterdir()) / PREDICTIONS).read_bytes() == before
    else:
        assert not list(tmp_path.glob(f"out/*/{METRICS}"))


@pytest.mark.parametrize(
    ("metric", "answers", "choices"),
    [
        ("infinitebench_function", ["f", "B"], []),
        ("longbench_v2_choice", ["A"], list("ABCD")),
        ("infinitebench_choice", ["D"], []),
        ("infinitebench_choice", ["Four", "D"], []),
        ("infinitebench_value", ["-3.5e2"], []),
        ("infinitebench_last_number", ["-7"], []),
        ("infinitebench_leading_numbers", ["-1", "4"], []),
        ("longbench_classification", ["x"], ["y"]),
        ("longbench_retrieval_zh", ["\u6bb5\u843d3"], []),
        ("loogle_exact_match", ['{"<mask-0>": "Ada"}'], []),
        ("scbench_function_python", ["def f(): 1"], ["def f(): 1", "def g(): 2"]),
        ("string_match", ["anything"], []),
        ("loogle_rouge_l", ["."], []),
    ],
)
def test_a_metric_that_fits_is_taken(metric, answers, choices):
    check_metric(metric, answers, choices)


def test_what_a_metric_cannot_read_is_told_by_trying(monkeypatch):
    def picky(prediction, answers, choices=()):
        return float(int(answers[0]))

    monkeypatch.setitem(METRIC_REGISTRY, "picky", picky)
    check_metric("picky", ["1"], [])
    with pytest.raises(cp.CachepressError, match="'picky' does not fit the answer .*invalid lit"):
        check_metric("picky", ["one"], [])


def test_every_metric_needs_an_answer():
    for metric in METRIC_REGISTRY:
        with pytest.raises(cp.CachepressError, match="does not fit"):
            check_metric(metric, [], [])


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows: rows.drop(columns="metric"),
        lambda rows: rows.drop(columns="predicted_answer"),
        lambda rows: rows.assign(answer="5"),
        lambda rows: rows.assign(answer="[5]"),
        lambda rows: rows.assign(choices="{}"),
        lambda rows: rows.assign(answer="[" * 100_000),
        lambda rows: rows.assign(context_id="x"),
        lambda rows: rows.assign(context_id="9" * 30),
        lambda rows: rows.assign(context_id="9" * 5000),
        lambda rows: rows[:0],
        lambda rows: rows[1:],
        lambda rows: pd.concat([rows, rows[:1]]),
        lambda rows: rows.assign(metric="unscored"),
    ],
)
def test_a_damaged_table_is_one_line(config, damage):
    folder, _ = run(config)
    rows = read_predictions(folder / PREDICTIONS).drop(columns="own_metric")
    damage(rows).to_csv(folder / PREDICTIONS, index=False)
    with pytest.raises(cp.CachepressError, match=r"predictions\.csv is damaged: .*evaluate again"):
        score_again(folder)


def test_half_of_a_surrogate_pair_in_a_choice_comes_back(config):
    folder, _ = run(config)
    rows = read_predictions(folder / PREDICTIONS).drop(columns="own_metric")
    rows.assign(choices='["\\ud800", "\\u0000"]').to_csv(folder / PREDICTIONS, index=False)
    for _ in range(2):
        score_again(folder)
        cells = set(read_predictions(folder / PREDICTIONS)["choices"])
        assert [json.loads(cell) for cell in cells] == [["\ud800", "\0"]]


def test_a_metric_for_what_none_judges_is_told(config, tmp_path, caplog):
    data = tmp_path / "t.jsonl"
    rows = [{"context": "w3 w4", "question": "w9", "answer": "w1", "max_new_tokens": 1}] * 2
    for metrics, told in ((["unscored"] * 2, 1), (["unscored", "string_match"], 0)):
        lines = [json.dumps({**r, "metric": m}) for r, m in zip(rows, metrics, strict=True)]
        data.write_text("\n".join(lines))
        load_table(EvaluationConfig(**{**config, "dataset": str(data)}, metric="qa_f1"), None)
        assert sum("no metric judges it, qa_f1 neither" in m for m in caplog.messages) == told
        caplog.clear()


def test_metrics_that_are_no_mapping_are_damaged(config):
    folder, _ = run(config)
    (folder / METRICS).write_text("[]")
    with pytest.raises(cp.CachepressError, match=r"metrics\.json: got \[\], wanted an object"):
        score_again(folder)


def test_odd_texts_survive_a_run_a_score_and_a_report(config, tmp_path, monkeypatch):
    odd = iter(["a\rb\0", "\ud800x", '=1+1,"y"\r\n', " \u241b0000 "])
    answer = Answerer.alone

    def oddly(self, run, context):
        found = answer(self, run, context)
        return {i: replace(a, predicted_answer=next(odd)) for i, a in found.items()}

    monkeypatch.setattr(Answerer, "alone", oddly)
    folder, _ = run(config)
    wanted = ["a\rb\0", "\ud800x", '=1+1,"y"\r\n', " \u241b0000 "]
    for _ in range(2):
        assert list(read_predictions(folder / PREDICTIONS)["predicted_answer"]) == wanted
        score_again(folder, "qa_f1")
        score_again(folder)
    before = (folder / PREDICTIONS).read_bytes()
    run(config)
    assert (folder / PREDICTIONS).read_bytes() == before
    (page,) = write_report(tmp_path / "out")
    assert "=1+1" in page.read_text()
