"""The tables of a sweep."""

import csv
import math
from dataclasses import replace

from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.results import Metrics
from cachepress.evaluation.run import Run
from cachepress.evaluation.runner import Result
from cachepress.evaluation.speed import SpeedLine, StepSeconds
from cachepress.evaluation.statistics import Estimate
from cachepress.evaluation.summary import (
    quality_table,
    ranking_table,
    speed_table,
    sweep_page,
    sweep_sheet,
    sweep_text,
)
from cachepress.presses import KnormPress


def result(press, ratio, score, kl=None, kept=None, **changes):
    metrics = Metrics(
        metrics=["string_match"],
        score=Estimate(score, 0.1, 0.9, 8, 2),
        tasks={},
        query_aware=False,
        kl=None if kl is None else Estimate(kl, math.nan, math.nan, 8, 2),
        perplexity=None,
        compression_ratio=ratio or 0.0,
        cache_bytes_before=2**20,
        cache_bytes_after=2**20 * (1 - (ratio or 0) if kept is None else kept),
        context_tokens=100,
        cut_contexts=None,
        cut_tokens=None,
        prefill_seconds=1.0,
        press_seconds=None,
        decode_tokens_per_second=10.0,
        decode_tokens_per_second_low=None,
        decode_tokens_per_second_high=None,
        peak_memory_bytes=None,
        machine="a machine",
    )
    metrics = replace(metrics, **changes)
    config = EvaluationConfig(dataset="builtin", press=press, compression_ratio=ratio)
    return Result(Run(config), metrics, None)


RESULTS = [
    result("no_press", None, 1.0, kl=0.0),
    result("knorm", 0.5, 0.5, kl=0.2),
    result("knorm", 0.25, 0.75, kl=0.1),
    result("keydiff", 0.25, 1.0, kl=0.3),
    result("keydiff", 0.5, 0.25, kl=0.5),
    result("AdaKVPress(SnapKVPress(0.5))", 0.25, 0.75, kl=0.05),
    result("AdaKVPress(SnapKVPress(0.5))", 0.5, 0.5, kl=0.05),
    result("tova", 0.5, 1.0, kl=0.0),
    result("dms(knorm, -17)", None, 1.0, kl=0.0),
]


def test_a_heading_says_what_is_out_of_the_ordinary_in_how_samples_were_asked():
    one = result("no_press", None, 1.0)
    assert sweep_text([[one]]).startswith("smollm2-135m on builtin, query-agnostic, 2 contexts, ")
    assert "cut" not in sweep_text([[one]])
    one = result("no_press", None, 1.0, cut_contexts=1, cut_tokens=12345)
    assert "8 samples, 1 context cut, 12,345 tokens in all\n" in sweep_text([[one]])
    one = result("no_press", None, 1.0, cut_contexts=3, cut_tokens=12345)
    assert "8 samples, 3 contexts cut, 12,345 tokens in all\n" in sweep_text([[one]])
    plain = Result(Run(EvaluationConfig(chat=False)), one.metrics, None)
    heading = "8 samples, no chat template, 3 contexts cut, 12,345 tokens in all\n"
    assert heading in sweep_text([[plain]]) and heading in sweep_page([[plain]], "a command")


def test_a_sheet_has_a_line_for_each_result_with_numbers_in_full():
    odd = {"machine": "=1+1", "cut_contexts": 1, "cut_tokens": 5, "compression_ratio": -0.001}
    one = result("AdaKVPress(SnapKVPress(0.5))", 0.25, 1 / 3, kl=0.2, **odd)
    named = Result(Run(EvaluationConfig(dataset="builtin", model="-m")), RESULTS[0].metrics, None)
    lines = sweep_sheet([[RESULTS[0], one], [named]]).splitlines(keepends=True)
    head, base, press, other = csv.reader(lines, quoting=csv.QUOTE_NONNUMERIC)
    base, press, other = (dict(zip(head, row, strict=True)) for row in (base, press, other))
    assert (base["press"], base["nominal ratio"], base["score"]) == ("no_press", "", 1)
    assert press["press"] == "adakv(snapkv)" and press["nominal ratio"] == 0.25
    assert press["score"] == 1 / 3 and (press["score low"], press["score high"]) == (0.1, 0.9)
    assert press["ratio"] == -0.001 and press["KL"] == 0.2 and press["bytes after"] == 786432
    assert (press["machine"], press["samples"]) == ("'=1+1", 8) and press["flips"] == ""
    assert press["notes"] == "1 context cut, 5 tokens in all" and other["model"] == "'-m"


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_best_mean_is_first_and_the_divergence_decides_ties():
    head, _, *rows = cells(ranking_table(RESULTS, "github"))
    assert head == ["press", "at 0.25", "at 0.5", "mean score", "mean KL", "mean bytes kept"]
    spread = "(0.10 to 0.90)"
    assert rows == [
        ["adakv(snapkv)", f"0.750 {spread}", f"0.500 {spread}", "0.625", "0.0500", "0.62"],
        ["knorm", f"0.750 {spread}", f"0.500 {spread}", "0.625", "0.1500", "0.62"],
        ["keydiff", f"1.000 {spread}", f"0.250 {spread}", "0.625", "0.4000", "0.62"],
    ]


def test_of_equals_one_without_a_divergence_comes_last():
    measured = {"knorm": 0.3, "tova": None, "keydiff": 0.1, "snapkv": 0.2}
    some = [result(name, r, 0.5, kl) for name, kl in measured.items() for r in (0.25, 0.5)]
    names = [row[0] for row in cells(ranking_table(some, "github"))[2:]]
    assert names == ["keydiff", "snapkv", "knorm", "tova"]


def test_presses_that_keep_more_than_their_ratio_says_are_ranked_at_equal_bytes():
    """By what they scored with fewer bytes; below all others where they never kept so few."""
    more = [
        result("no_press", None, 1.0, kept=1.25),
        result("knorm", 0.5, 0.5, kept=0.56),
        result("knorm", 0.9, 0.1, kept=0.14),  # 0.11 of what no press allocates.
        result("tova", 0.5, 1.0, kept=0.80),
        result("tova", 0.9, 0.7, kept=0.60),
        result("keydiff", 0.5, 1.0, kept=1.0),
        result("keydiff", 0.9, 0.9, kept=0.9),
    ]
    rows = cells(ranking_table(more, "github"))[2:]
    spread = "(0.10 to 0.90)"
    assert rows == [
        ["knorm", f"0.500 {spread}", f"0.100 {spread}", "0.300", "", "0.35"],
        ["tova", f"0.700 {spread}", "", "0.700", "", "0.60"],
        ["keydiff", "", "", "", "", ""],
    ]


def test_a_ranking_without_divergences_has_none():
    some = [result("knorm", ratio, 0.5) for ratio in (0.25, 0.5)]
    assert cells(ranking_table(some, "github"))[2][-3:] == ["0.500", "", "0.62"]


def test_one_ratio_or_no_scores_make_no_ranking():
    assert ranking_table([result("knorm", 0.5, 1.0)]) is None
    some = [result("knorm", ratio, 1.0) for ratio in (0.25, 0.5)]
    unscored = replace(some[0], metrics=replace(some[0].metrics, score=None))
    assert ranking_table(some) is not None and ranking_table([unscored, some[1]]) is None


def test_the_page_has_the_ranking_before_everything():
    page = sweep_page([RESULTS, RESULTS[:2]], "cachepress sweep --presses all")
    first, second = page.split("## ")[1:]
    assert "This page is made by `cachepress sweep --presses all`." in page
    assert first.index("mean KL") < first.index("Everything that was measured:")
    assert "dms(knorm, -17)" in first.split("Everything that was measured:")[1]
    assert "mean KL" not in second and "| knorm" in second
    assert page.count("Measured on: a machine") == 1


def test_a_line_of_the_demo_says_what_was_asked_and_what_is_left():
    aware = EvaluationConfig(press="knorm", compression_ratio=0.5, query_aware=True)
    seen = Result(Run(aware), result("knorm", 0.5, 0.25).metrics, None)
    _, _, *rows = cells(quality_table([RESULTS[:2], [seen]], "github"))
    assert [row[:4] + row[-1:] for row in rows] == [
        ["no_press", "later", "0.000", "1.000", "1.0 MiB"],
        ["knorm", "later", "0.500", "0.500", "0.5 MiB"],
        ["knorm", "in sight", "0.500", "0.250", "0.5 MiB"],
    ]


def test_speed_is_told_against_the_first_line():
    lines = [
        SpeedLine(None, 0.0, StepSeconds(0.2, 0.1, 0.3), 4 << 20),
        SpeedLine(KnormPress(0.75), 0.75, StepSeconds(0.08, 0.05, 0.09), 1 << 20),
    ]
    _, _, *rows = cells(speed_table(lines, "github"))
    assert rows == [
        ["no_press", "0.000", "4.0 MiB", "200.0", "100.0 to 300.0", "1.00"],
        ["knorm", "0.750", "1.0 MiB", "80.0", "50.0 to 90.0", "2.50"],
    ]
