"""The report of results: values, comparisons, hostile texts, tables, damaged files."""

import csv
import json
import re
import shutil
import subprocess

import pytest

from cachepress.errors import CachepressError
from cachepress.pages.report import write_report
from tests.pages.results import HOSTILE, Page, write_run

ONES = [1.0] * 8


def report(folder):
    (path,) = write_report(folder, None, ["html"])
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def results(tmp_path):
    """No press, and two presses of which one is beaten."""
    folder = tmp_path / "results"
    half = [1.0] * 4 + [0.0] * 4
    write_run(folder, "no_press", 0.0, ONES)
    write_run(folder, "snapkv", 0.5, [1.0] * 6 + [0.0] * 2, kl=[0.5] * 8, speed=12.0)
    write_run(folder, "snapkv", 0.75, half, kl=[0.75] * 8, speed=14.0)
    write_run(folder, "knorm", 0.5, half, kl=[1.0] * 8, speed=11.0)
    (folder / "running").mkdir()
    return folder


def test_the_numbers_of_every_run_are_in_the_page(results):
    (panel,) = report(results).data["data"][0]
    cells = {cell["label"]: cell for cell in panel["cells"]}
    assert list(cells) == ["no_press", "knorm 0.5", "snapkv 0.5", "snapkv 0.75"]
    snapkv = cells["snapkv 0.5"]
    assert snapkv["kept"] == 0.5 and snapkv["speed"] == 12.0 and snapkv["achieved"] == 0.5
    score = snapkv["qualities"]["score"]
    assert score["mean"] == 0.75 and 0 < score["low"] < 0.75 < score["high"] < 1
    assert snapkv["difference"]["mean"] == -0.25
    assert snapkv["difference"]["low"] < -0.25 < snapkv["difference"]["high"]
    assert snapkv["qualities"]["kl"]["mean"] == 0.5
    assert cells["no_press"]["difference"] is None and cells["no_press"]["base"]


def test_there_is_no_front_where_nothing_can_be_told_apart(results):
    (panel,) = report(results).data["data"][0]
    for cell in panel["cells"]:
        assert "score" not in cell["fronts"]["kept"] and "score" not in cell["fronts"]["speed"]
    leads = {cell["label"]: cell["leads"] for cell in panel["cells"]}
    assert {label for label, found in leads.items() if "score" in found} == {
        "no_press",
        "snapkv 0.5",
        "snapkv 0.75",
    }
    assert {label for label, found in leads.items() if "kl" in found} == {
        "snapkv 0.5",
        "snapkv 0.75",
    }
    assert write_report(results, formats=["svg"])


def _share(right: int) -> list[float]:
    return [1.0] * right + [0.0] * (200 - right)


def _fronts(folder, cost):
    (panel,) = report(folder).data["data"][0]
    return [cell["label"] for cell in panel["cells"] if "score" in cell["fronts"][cost]]


def test_the_front_goes_through_what_can_be_told_apart(tmp_path):
    write_run(tmp_path, "no_press", 0.0, _share(190), speed=10.0)
    write_run(tmp_path, "snapkv", 0.5, _share(185), speed=20.0)
    write_run(tmp_path, "snapkv", 0.75, _share(120), speed=30.0)
    write_run(tmp_path, "knorm", 0.5, _share(60), speed=20.0)
    write_run(tmp_path, "knorm", 0.9, _share(20), speed=30.1)
    # 190 right of 200 are not more than 185; 30.1 tokens a second, give or take, not more than 30.
    assert _fronts(tmp_path, "kept") == ["knorm 0.9", "snapkv 0.5", "snapkv 0.75"]
    assert _fronts(tmp_path, "speed") == ["snapkv 0.5", "snapkv 0.75"]


@pytest.mark.parametrize("noise", [0.6, None])
def test_there_is_no_front_of_speeds_that_differ_by_noise(tmp_path, noise):
    write_run(tmp_path, "no_press", 0.0, _share(190), speed=10.0, noise=noise)
    write_run(tmp_path, "snapkv", 0.75, _share(60), speed=20.0, noise=noise)
    assert _fronts(tmp_path, "speed") == []
    assert _fronts(tmp_path, "kept") == ["no_press", "snapkv 0.75"]
    (panel,) = report(tmp_path).data["data"][0]
    ends = [(cell["speed_low"], cell["speed_high"]) for cell in panel["cells"]]
    assert ends == [(None, None)] * 2 if noise is None else [(4.0, 16.0), (8.0, 32.0)]


def test_the_table_has_flips_and_same_answers(results):
    texts = [text.strip() for text in report(results).texts if text.strip()]
    start = texts.index("snapkv", texts.index("knorm", texts.index("All numbers")))
    row = texts[start : start + 14]
    assert row[:4] == ["snapkv", "0.50", "0.500", "0.500"]
    assert row[4].startswith("0.750 (")
    assert row[5].startswith("-0.250 (")
    assert row[6:8] == ["0.250", "0.750"]


def test_the_page_says_what_is_not_finished_and_what_presses_saw(results):
    page = report(results)
    texts = " ".join(page.texts)
    assert "Not finished: 1" in texts and "running" in texts
    assert "query-agnostic: the press does not see the question" in texts


def test_hostile_texts_stay_texts(tmp_path):
    write_run(tmp_path, "no_press", 0.0, ONES, answers=[HOSTILE] * 8)
    write_run(tmp_path, f"x{HOSTILE}", 0.5, ONES, answers=["other"] * 8)
    page = report(tmp_path)
    assert page.tags.count("script") == 4  # one panel's samples, the data, plotly, ours
    assert "b" not in page.tags
    samples = page.data["samples-data"][0]
    assert samples["cells"][0]["predicted_answer"] == [HOSTILE] * 8
    assert samples["answer"][3] == ["wanted 3", HOSTILE]
    assert samples["question"][3] == f"question 3 {HOSTILE}"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    data = text[text.index('id="data">') :].partition("</script>")[0]
    assert "\u2028" not in data and "&" not in data


def test_the_page_is_one_file(results):
    assert report(results).refers_to_nothing()


def test_other_weights_make_a_panel_of_their_own_and_a_learned_file_none(tmp_path):
    new, old = ({"weights": name, "tokenizer": "t"} for name in ("new", "old"))
    write_run(tmp_path, "no_press", 0.0, ONES, digests=new, schema=1)
    write_run(tmp_path, "qfilter", 0.5, ONES, digests={**new, "0 q_filters": "f"}, schema=2)
    write_run(tmp_path, "knorm", 0.5, ONES, digests=old, schema=1)
    write_run(tmp_path, "snapkv", 0.5, ONES)
    page = report(tmp_path)
    cells = [
        [(cell["press"], cell["difference"] is not None) for cell in panel["cells"]]
        for panel in page.data["data"][0]
    ]
    assert cells == [
        [("no_press", False), ("qfilter", True)],
        [("knorm", False)],
        [("snapkv", False)],
    ]
    text = " ".join(page.texts)
    assert all(f"weights digest: {name}" in text for name in ("new", "old", "unknown"))
    assert "tokenizer digest: t" in text and "digests" not in text


def test_query_awareness_and_storage_make_panels_of_their_own(tmp_path):
    write_run(tmp_path, "no_press", 0.0, ONES)
    write_run(tmp_path, "knorm", 0.5, ONES, storage="int4", kept=0.125)
    write_run(tmp_path, "finch", 0.5, ONES, query_aware=True, seed=0)
    panels = report(tmp_path).data["data"][0]
    labels = [[(cell["label"], cell["guest"]) for cell in panel["cells"]] for panel in panels]
    assert labels == [
        [("no_press", False)],
        [("no_press (storage full)", True), ("knorm 0.5", False)],
        [("no_press (query-agnostic)", True), ("finch 0.5", False)],
    ]
    assert panels[1]["cells"][1]["kept"] == 0.125
    assert panels[1]["cells"][1]["difference"]["mean"] == 0.0


def test_the_page_says_what_was_cut_and_how_samples_were_asked(tmp_path):
    write_run(tmp_path, "no_press", 0.0, ONES)
    place = write_run(tmp_path, "knorm", 0.5, ONES) / "metrics.json"
    assert "contexts cut" not in " ".join(report(tmp_path).texts)
    told = {"cut_contexts": 3, "cut_tokens": 12345}
    place.write_text(json.dumps(json.loads(place.read_text()) | told))
    page = report(tmp_path)
    assert "3 contexts cut, 12,345 tokens in all" in page.texts
    assert "cut tokens" in page.texts and "12,345" in page.texts
    write_run(tmp_path, "knorm", 0.5, ONES, chat=False)
    texts = report(tmp_path).texts
    assert "chat: no" in texts and "chat: default" in texts


def test_what_a_benchmark_reports_beside_the_score_has_a_column(tmp_path):
    place = write_run(tmp_path, "no_press", 0.0, ONES) / "metrics.json"
    told = {"mean": 0.625, "low": 0.5, "high": 0.75, "samples": 4, "contexts": 4}
    metrics = json.loads(place.read_text()) | {"reported": {"longdep_qa": {"rouge_l": told}}}
    place.write_text(json.dumps(metrics))
    page = report(tmp_path)
    assert "longdep_qa: rouge_l" in page.texts
    assert "0.625 (0.50 to 0.75)" in page.texts
    place.write_text(json.dumps(metrics | {"reported": {"longdep_qa": 3}}))
    with pytest.raises(CachepressError, match="longdep_qa is 3, wanted a mapping"):
        report(tmp_path)


def test_settings_that_differ_have_a_column_and_the_others_are_listed_once(tmp_path):
    write_run(tmp_path, "no_press", 0.0, ONES)
    write_run(tmp_path, "knorm", 0.5, ONES, storage="int4")
    texts = [text.strip() for text in report(tmp_path).texts if text.strip()]
    second = texts[texts.index("storage: int4") :]
    shared = second[: second.index("All numbers")]
    assert shared[shared.index("seed") + 1] == "0" and "storage" not in shared
    headers = second[second.index("press") : second.index("folder")]
    assert headers[-2:] == ["storage", "spelling"]


def test_without_a_run_without_a_press_kept_bytes_are_of_the_runs_own(tmp_path):
    write_run(tmp_path, "knorm", 0.5, ONES, kept=0.25)
    page = report(tmp_path)
    (panel,) = page.data["data"][0]
    assert panel["cells"][0]["kept"] == 0.25 and panel["cells"][0]["difference"] is None
    assert any("no run without a press" in text for text in page.texts)


def test_one_context_says_nothing_of_others(tmp_path):
    write_run(tmp_path, "no_press", 0.0, ONES, contexts=[0] * 8)
    cell = write_run(tmp_path, "knorm", 0.5, ONES, contexts=[0] * 8, kl=[0.5] * 8)
    assert "Infinity" in (cell / "metrics.json").read_text()
    page = report(tmp_path)
    knorm = page.data["data"][0][0]["cells"][1]
    assert (knorm["difference"]["low"], knorm["difference"]["high"]) == (-1.0, 1.0)
    assert knorm["qualities"]["kl"]["high"] is None
    assert "+0.000 (-1.00 to 1.00)" in page.texts and "0.500 ±?" in page.texts
    assert "nan" not in " ".join(page.texts).lower().split()


def test_what_was_not_scored_is_compared_by_its_answers(tmp_path):
    write_run(tmp_path, "no_press", 0.0, None, answers=["a", "b"])
    write_run(tmp_path, "knorm", 0.5, None, answers=["a", "c"], kl=[0.5, 0.25], speed=None)
    page = report(tmp_path)
    (panel,) = page.data["data"][0]
    assert list(panel["qualities"]) == ["kl"]
    assert panel["cells"][1]["difference"] is None and panel["cells"][1]["speed"] is None
    assert "0.500" in page.texts


def test_the_needle_has_a_map_of_means(tmp_path):
    places = [(500, 0.0), (500, 0.0), (500, 1.0), (1000, 0.0)]
    write_run(tmp_path, "no_press", 0.0, [1.0, 0.0, 1.0, 0.25], places=places)
    grid = report(tmp_path).data["data"][0][0]["cells"][0]["needle"]
    assert grid["lengths"] == ["500", "1000"] and grid["depths"] == ["0", "1"]
    assert grid["scores"] == [[0.5, 0.25], [1.0, None]]
    assert grid["counts"] == [[2, 1], [1, 0]]


def test_many_depths_are_put_together(tmp_path):
    places = [(500, i / 39) for i in range(40)]
    write_run(tmp_path, "no_press", 0.0, [1.0] * 40, places=places)
    grid = report(tmp_path).data["data"][0][0]["cells"][0]["needle"]
    assert len(grid["depths"]) == 10 and grid["depths"][0] == "0 to 0.1"
    assert sum(row[0] for row in grid["counts"]) == 40


def test_tables(results):
    md, tex = write_report(results, None, ["md", "latex"])
    assert (md.name, tex.name) == ("table.md", "table.tex")
    lines = md.read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| snapkv | 0.50")]
    assert "| 0.750 (" in row and "| -0.250 (" in row
    text = tex.read_text()
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    assert r"no\_press & 0.00 & 0.000 & 1.000" in text
    assert "$-$0.250 ($-$0." in text
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len({line.count(" & ") for line in rows}) == 1 and len(rows) == 5


def rows_of(path):
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    head, *rows = csv.reader(lines, quoting=csv.QUOTE_NONNUMERIC)
    assert len(set(head)) == len(head)
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_table_for_spreadsheets_has_numbers_in_full_and_no_formulas(results):
    write_run(results, "=cmd|' /C calc'!A0", 0.5, ONES, device="-1")
    write_run(results, "tova", 0.5, ONES, model="@other")
    (path,) = write_report(results, None, ["csv"])
    assert path == results / "table.csv"
    rows = rows_of(path)
    assert len(rows) == 6 and {row["of"].split(" ")[0] for row in rows} == {"tiny", "'@other"}
    (row,) = [row for row in rows if row["folder"].startswith("'=cmd")]
    assert row["press"] == "'=cmd|' /C calc'!A0" and row["device"] == "'-1" and row["score"] == 1
    (row,) = [row for row in rows if (row["press"], row["nominal ratio"]) == ("snapkv", 0.5)]
    assert (row["score"], row["vs no_press"], row["KL"], row["tokens/s"]) == (0.75, -0.25, 0.5, 12)
    assert 0 < row["score low"] < 0.75 < row["score high"] < 1
    assert row["vs no_press low"] < -0.25 < row["vs no_press high"]
    assert row["samples"] == 8 and row["perplexity"] == "" and row["Pareto front"] == ""


def test_tables_escape_what_their_language_reads(tmp_path):
    write_run(tmp_path, r"a|b\c_{d}~$%#&^<i>", 0.5, ONES)
    md, tex = (path.read_text() for path in write_report(tmp_path, None, ["md", "latex"]))
    assert r"a\|b\\c\_{d}~$%\#&^\<i\>" in md
    escaped = r"a|b\textbackslash{}c\_\{d\}\textasciitilde{}\$\%\#\&\textasciicircum{}"
    assert escaped + r"\textless{}i\textgreater{}" in tex


def test_pictures(results, tmp_path):
    out = tmp_path / "pictures"
    written = write_report(results, out, ["png", "svg"])
    assert {path.name for path in written} == {
        "quality.png",
        "speed.png",
        "quality.svg",
        "speed.svg",
    }
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    first = (out / "quality.svg").read_bytes()
    write_report(results, out, ["svg"])
    assert (out / "quality.svg").read_bytes() == first
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in written)


def test_the_needle_has_a_picture_and_panels_have_numbers(tmp_path):
    places = [(500, 0.5), (1000, 0.5)]
    write_run(tmp_path, "no_press", 0.0, [1.0, 0.0], places=places)
    write_run(tmp_path, "no_press", 0.0, [1.0, 0.0], data_dir="other", speed=None)
    names = {path.name for path in write_report(tmp_path, None, ["png"])}
    assert names == {"quality-1.png", "speed-1.png", "needle-1.png", "quality-2.png"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.json", "{", "metrics.json is damaged"),
        ("metrics.json", "[]", "metrics.json: got []"),
        ("metrics.json", '{"tasks": {}}', "metrics.json: "),
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", "- a", "config.yaml: got ['a']"),
        ("config.yaml", "press: 3", "config.yaml: press is 3, wanted a text"),
        ("predictions.csv", "", "predictions.csv is damaged"),
        ("predictions.csv", "a,b\n1,2\n", "no column 'sample_id'"),
        (
            "predictions.csv",
            "sample_id,question,answer,context_id,predicted_answer\n1,q,[,0,x\n",
            "predictions.csv is damaged",
        ),
        (
            "predictions.csv",
            "sample_id,question,answer,context_id,predicted_answer,score\n1,q,[],0,x,no\n",
            "predictions.csv is damaged",
        ),
        (
            "predictions.csv",
            "sample_id,question,answer,context_id,predicted_answer\n1,q,[],0,x\n1,q,[],0,x\n",
            "same sample_id",
        ),
    ],
)
def test_a_damaged_file_is_one_line_with_its_name(results, name, text, message):
    (results / "snapkv__0.5" / name).write_text(text)
    with pytest.raises(CachepressError) as caught:
        write_report(results, None, ["html"])
    assert message in str(caught.value) and "snapkv__0.5" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (results / "report.html").exists()


@pytest.mark.parametrize("name", ["config.yaml", "predictions.csv"])
def test_a_file_that_is_missing_is_named(results, name):
    (results / "snapkv__0.5" / name).unlink()
    with pytest.raises(CachepressError, match=f"{name}: No such file"):
        write_report(results, None, ["html"])


def test_without_a_finished_run_it_says_what_to_run(tmp_path):
    (tmp_path / "running").mkdir()
    with pytest.raises(CachepressError, match="cachepress evaluate --output-dir"):
        write_report(tmp_path, None, ["html"])
    with pytest.raises(CachepressError, match="is not a folder"):
        write_report(tmp_path / "nowhere", None, ["html"])
    with pytest.raises(CachepressError, match="format: got 'pdf'"):
        write_report(tmp_path, None, ["pdf"])


def test_a_field_of_the_wrong_kind_is_named(results):
    path = results / "snapkv__0.5" / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps({**metrics, "prefill_seconds": "fast"}))
    with pytest.raises(CachepressError, match=r"metrics.json: prefill_seconds is 'fast'"):
        write_report(results, None, ["html"])


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
FRAME = """<!DOCTYPE html><body>
<iframe id="frame" src="{page}" style="width: {first}px; height: 900px"></iframe><script>
const page = () => document.getElementById("frame").contentDocument;
document.getElementById("frame").onload = () => setTimeout(() => {{
  document.getElementById("frame").style.width = "{then}px";
  setTimeout(() => {{
    const root = page().documentElement;
    const drawn = page().querySelectorAll("svg.main-svg").length;
    const widths = `widths ${{root.clientWidth}} ${{root.scrollWidth}}`;
    document.body.textContent = `${{widths}}, drawn ${{drawn}}`;
  }}, 1000);
}}, 2000);
</script>"""
"""A page in a frame, which says how wide it is once the frame got another width."""


@pytest.mark.skipif(BROWSER is None, reason="it takes a browser")
@pytest.mark.parametrize(("first", "then"), [(400, 400), (1200, 400), (400, 1200)])
def test_charts_fit_a_narrow_window_also_when_it_was_wide(tmp_path, first, then):
    for press, ratio in (("no_press", 0.0), ("a" * 90, 0.5)):
        write_run(tmp_path, press, ratio, ONES, places=[(100, 0.5)] * len(ONES))
    (page,) = write_report(tmp_path)
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=page.as_uri(), first=first, then=then))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=9000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"widths (\d+) (\d+), drawn (\d+)", done.stdout)
    assert found and [int(found[1]), int(found[2])] == [then, then] and int(found[3]) >= 3
