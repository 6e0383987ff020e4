"""The harness for GPUs, tried on a CPU: cells, lines, the time limit, and what the page says."""

import json
import os
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import cachepress as cp
from benchmarks.card import command, worker
from benchmarks.card import lab as lab_module
from benchmarks.card.decode import decode_steps, room_steps
from benchmarks.card.kernel import Shape as LayerShape
from benchmarks.card.kernel import layer_of, shapes
from benchmarks.card.kvpress import NOT_GIVEN, kvpress
from benchmarks.card.lab import (
    ADA_90,
    DYNAMIC,
    WHOLE,
    Lab,
    count_replays,
    replays,
    stepping,
)
from benchmarks.card.page import MARK, NONE_YET, page, table
from benchmarks.card.peaks import PRESSES, UNTAUGHT, spelled
from benchmarks.card.plan import SECTIONS, TINY, Job, Sizes, allowed, sizes_of
from benchmarks.card.records import LINE, NO_TIME, Record, Section, line_of
from benchmarks.card.wanted import wanted
from cachepress.catalogue import own_presses
from cachepress.generation.cache_files import CachepressError
from tests.bare import bare

ROOT = Path(__file__).parents[2]
PAGE, DATA = ROOT / "docs" / "gpu.md", ROOT / "docs" / "gpu.json"
FAKE = """
from cachepress import SnapKVPress as _Snap, AdaKVPress
def SnapKVPress(compression_ratio): return _Snap(compression_ratio)
"""
"""A package that has the two names of kvpress that are used."""


def job(tmp_path, sections=("decode",), minutes=6.0, seconds=60.0, **more):
    path = tmp_path / "gpu.json"
    if not path.exists():
        Record(sizes=sizes_of(True)).write(path)
    end = time.time() + seconds
    return Job(str(path), list(sections), end, minutes, "cpu", True, **more)


def read(tmp_path):
    return Record.read(tmp_path / "gpu.json")


def tried(folder):
    """Every section at tiny shapes, in an environment without any other package."""
    python = bare(folder / "bare")
    (folder / "kvpress.py").write_text(FAKE)
    other = folder / "python"
    other.write_text(f'#!/bin/sh\nPYTHONPATH={folder}:{ROOT} exec {python} "$@"\n')
    other.chmod(0o755)
    options = ["--tiny", "--minutes", "60", "--output", str(folder), "--kvpress-python", str(other)]
    done = subprocess.run(
        [python, "benchmarks/gpu.py", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, Record.read(folder / "gpu.json")


@pytest.mark.timeout(1800)
def test_every_section_is_measured_with_torch_triton_and_transformers_alone(tmp_path):
    said, record = tried(tmp_path)
    assert list(record.sections) == list(SECTIONS)
    assert {own.state for own in record.sections.values()} == {"done"}
    lines = [x[LINE] for own in record.sections.values() for x in own.cells.values() if LINE in x]
    assert all("this version of cachepress has no compiled steps" in line for line in lines)
    assert record.sizes == sizes_of(True) and record.running == []
    assert record.machine["torch"] == torch.__version__
    counts = {name: len(own.cells) for name, own in record.sections.items()}
    assert counts["decode"] == 1 + len(decode_steps(TINY))
    assert counts["room"] == len(room_steps(TINY))
    assert counts["kernel"] == len(shapes(TINY))
    assert counts["peaks"] == 2 * 8 + 2 * 6 + len(PRESSES) - 7
    assert counts["kvpress"] == 6
    assert all(x["equal"] for x in record.measured("parity"))
    assert {x["kind"] for x in record.measured("parity")} == {"steps", "ways", "presses"}
    assert said.splitlines()[1].startswith("decode: 1 x 192, AdaKV(SnapKV) 0.9, recorded, loop: ")
    assert said.splitlines()[-1] == str(tmp_path / "gpu.md")
    ratios_follow_from_times(record)
    the_page_says_what_the_json_says((tmp_path / "gpu.md").read_text(), said, record)


def ratios_follow_from_times(record):
    copy = 1e9 * record.one("decode", "gb_s")
    for x in [*record.measured("decode", way="loop"), *record.measured("room")]:
        assert x["of_limit"] == pytest.approx(x["ms"] / x["limit_ms"])
        assert x["tokens_s"] == pytest.approx(1e3 * x["batch"] / x["ms"])
    for x in record.measured("kernel"):
        assert x["of_sdpa"] == pytest.approx(x["calls_us"] / x["sdpa_calls_us"])
        assert x["of_copy"] == pytest.approx(1e6 * x["bytes"] / x["calls_us"] / copy)
    whole = next(record.measured("decode", cache="DynamicCache", batch=1, length=192))
    ours = next(record.measured("decode", cache="AdaKV(SnapKV) 0.9", batch=1, length=192))
    kept = 4 * 2 * 2 * 16 * 4 * 192  # Layers, keys and values, heads, channels, bytes, tokens.
    apart = 1e-3 * (whole["limit_ms"] - ours["limit_ms"]) * copy
    assert apart == pytest.approx(kept * (1 - ours["pairs_share"]))
    assert ours["pairs_share"] == pytest.approx(0.1, abs=0.01)


def the_page_says_what_the_json_says(text, said, record):
    assert text == page(PAGE.read_text(), record)
    assert text.count(MARK) == 1 and NONE_YET not in text
    assert f"torch {torch.__version__}, transformers" in text and record.command in text
    for one in wanted(record):
        (line,) = (x for x in text.splitlines() if x.startswith(f"| {one.what} |"))
        assert line.endswith(f"| {one.said} |")
        assert any(x.startswith(f"{one.said}: {one.what}: ") for x in said.splitlines())
    for name in ("snapkv", "kvgrad", "cam"):
        (found,) = record.measured("peaks", press=name, length=192)
        (line,) = (x for x in text.splitlines() if x.startswith(f"| {name} | 2 | 192 |"))
        assert f"{found['seconds']:.2g}" in line or f"{found['seconds']:.3g}" in line
    steps = len(list(record.measured("parity", kind="steps")))
    assert f"- {steps} of {steps} architectures decode recorded as they do eagerly" in text


def test_what_kvpress_does_not_give_has_a_line(tmp_path):
    python = tmp_path / "python"
    cell = json.dumps({"cell": "none, 96", "ms": 2.0})
    python.write_text(f"#!/bin/sh\necho '{cell}'\necho first >&2\necho no kvpress here >&2\n")
    python.chmod(0o755)
    own = job(tmp_path, ("kvpress",), kvpress_python=str(python))
    assert worker.measure(read(tmp_path), "kvpress", kvpress(Lab(own)), own, lambda: True)
    cells = read(tmp_path).cells("kvpress")
    assert cells["none, 96"] == {"ms": 2.0}
    lines = {x[LINE] for name, x in cells.items() if name != "none, 96"}
    assert lines == {"RuntimeError: kvpress ended before it: no kvpress here"} and len(cells) == 6
    own = job(tmp_path, ("kvpress",))
    ((name, work),) = kvpress(Lab(own))
    assert (name, work()) == ("kvpress", {LINE: NOT_GIVEN})


def test_kvpress_has_its_time_and_no_more(tmp_path):
    python = tmp_path / "python"
    cell = json.dumps({"cell": "none, 96", "ms": 2.0})
    python.write_text(f"#!/bin/sh\necho '{cell}'\nexec sleep 600\n")
    python.chmod(0o755)
    own = job(tmp_path, ("kvpress",), seconds=2, kvpress_python=str(python))
    cells = dict(kvpress(Lab(own)))
    assert cells["none, 96"]() == {"ms": 2.0}
    with pytest.raises(RuntimeError, match="kvpress ended before it: its . s were up"):
        cells["none, 192"]()


def test_the_page_of_the_site_is_that_of_its_data():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, Record.read_if_any(DATA)) == text
    assert "PYTHONPATH=. python benchmarks/gpu.py --minutes 6" in text
    assert (NONE_YET in text) == (not DATA.exists())


def test_what_raises_is_a_line_and_the_next_goes_on(tmp_path):
    own, seen = job(tmp_path), []

    def wrong():
        seen.append(read(tmp_path).running)
        raise CachepressError("so it\nis")

    def right():
        seen.append(dict(read(tmp_path).cells("decode")))
        return {"ms": 1.5}

    cells = [("a", lambda: {"ms": 2.0}), ("b", wrong), ("c", right)]
    assert worker.measure(read(tmp_path), "decode", cells, own, lambda: True)
    # What was measured is in the file before the next begins.
    line = {LINE: "CachepressError: so it is"}
    assert seen == [["decode", "b"], {"a": {"ms": 2.0}, "b": line}]
    record = read(tmp_path)
    assert record.sections["decode"].state == "done" and record.running == []
    assert record.cells("decode") == {"a": {"ms": 2.0}, "b": line, "c": {"ms": 1.5}}


def test_memory_that_ran_out_does_not_fit():
    for error in (
        MemoryError("does not fit: the cache needs 8 GiB, 4 are free"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        CachepressError("out of memory: CUDA out of memory"),
    ):
        assert line_of(error).startswith("does not fit: ")
        assert line_of(error).count("does not fit") == 1


def test_without_time_there_are_lines_and_nothing_runs(tmp_path):
    own = job(tmp_path, seconds=-1)
    cells = [("a", lambda: pytest.fail("it ran")), ("b", lambda: pytest.fail("it ran"))]
    assert worker.measure(read(tmp_path), "decode", cells, own, lambda: True)
    section = read(tmp_path).sections["decode"]
    assert section.state == "cut"
    assert section.cells == {"a": {LINE: NO_TIME}, "b": {LINE: NO_TIME}}
    sections = {"decode": section}
    text = page("", Record(sizes=sizes_of(True), sections=sections))
    assert "- no time was left for 2: a; b" in text


def test_a_device_that_is_broken_is_given_up_and_its_section_goes_on_later(tmp_path):
    def broken():
        raise RuntimeError("illegal memory access")

    cells = [("a", broken), ("b", lambda: {"ms": 1.0})]
    own = job(tmp_path)
    assert not worker.measure(read(tmp_path), "decode", cells, own, lambda: False)
    assert read(tmp_path).sections["decode"].state == "running"
    assert command.ended(own, ["decode", "kernel"], worker.BROKEN) == ["decode", "kernel"]
    assert worker.measure(read(tmp_path), "decode", cells, own, lambda: True)
    section = read(tmp_path).sections["decode"]
    assert section.state == "done"
    assert section.cells == {
        "a": {LINE: "RuntimeError: illegal memory access"},
        "b": {"ms": 1.0},
    }


SAYS = """
import json, sys, time
from pathlib import Path
from benchmarks.card.records import Record, Section
job = json.loads(sys.argv[1])
for name in job["sections"]:
    record = Record.read(Path(job["data"]))
    record.running = [name, "cell"]
    record.section(name).state = "running"
    record.write(Path(job["data"]))
    {does}
    record.running, record.sections[name] = [], Section("done", 1.0, {{"cell": {{"ms": 1.0}}}})
    record.write(Path(job["data"]))
"""
"""A worker that writes what ours writes, and does something else in between."""


def pretend(monkeypatch, does):
    monkeypatch.setattr(command, "WORKER", ("-c", SAYS.format(does=does)))


def test_a_section_that_hangs_is_killed_and_the_next_runs(tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, "name == 'decode' and time.sleep(600)")
    own = job(tmp_path, ("decode", "kernel"), minutes=0.06)
    start = time.time()
    assert command.run(own)
    assert time.time() - start < 50
    record = read(tmp_path)
    assert record.sections["decode"].state == "cut"
    assert record.cells("decode") == {"cell": {LINE: "killed when its time was up"}}
    assert record.cells("kernel") == {"cell": {"ms": 1.0}}
    assert "decode: cell: killed when its time was up" in capsys.readouterr().out


def test_a_run_ends_within_its_minutes_whatever_hangs(tmp_path, monkeypatch):
    pretend(monkeypatch, "time.sleep(600)")
    start = time.time()
    assert command.run(job(tmp_path, ("decode", "kernel"), seconds=6))
    assert time.time() - start < 6 + command.LAST
    record = read(tmp_path)
    assert [own.state for own in record.sections.values()] == ["cut", "not reached"]
    text = page("", record)
    assert "Not reached in this run." in text and "killed when its time was up" in text


def test_a_process_that_dies_loses_one_cell(tmp_path, monkeypatch):
    dies = "name == 'decode' and not record.section(name).cells and __import__('os')._exit(7)"
    pretend(monkeypatch, dies)
    assert command.run(job(tmp_path, ("decode", "kernel")))
    record = read(tmp_path)
    assert [own.state for own in record.sections.values()] == ["done", "done"]
    monkeypatch.setattr(command, "WORKER", ("-c", "raise SystemExit(1)"))
    (tmp_path / "gpu.json").unlink()
    assert command.run(job(tmp_path, ("decode", "kernel")))
    for name in ("decode", "kernel"):
        line = "no worker started: its process ended with 1"
        assert read(tmp_path).cells(name) == {"start": {LINE: line}}


def test_without_a_gpu_it_says_so_and_leaves_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "WORKER", ("-c", f"raise SystemExit({worker.NO_DEVICE})"))
    kept = tmp_path / "gpu.json"
    for before in (None, '{"date": "before"}'):
        if before is not None:
            kept.write_text(before)
        with pytest.raises(SystemExit, match="no GPU is here that torch can use: --tiny tries"):
            command.main("", ["--output", str(tmp_path)])
        assert (kept.read_text() if kept.exists() else None) == before


def test_sections_that_are_not_asked_for_stay_as_they_were(tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, "pass")
    command.main("", ["--tiny", "--output", str(tmp_path), "--minutes", "1"])
    record = read(tmp_path)
    assert list(record.sections) == list(SECTIONS)
    record.sections["decode"].cells["cell"] = {"ms": 2.0}
    record.write(tmp_path / "gpu.json")
    command.main("", ["kernel", "--tiny", "--output", str(tmp_path), "--minutes", "1"])
    assert read(tmp_path).cells("decode") == {"cell": {"ms": 2.0}}
    assert read(tmp_path).cells("kernel") == {"cell": {"ms": 1.0}}
    with pytest.raises(SystemExit):
        command.main("", ["kernels"])
    assert "unknown section 'kernels': wanted one of decode, " in capsys.readouterr().err


def test_what_is_wanted_is_computed_from_the_cells():
    sizes = sizes_of(False)
    step = {"batch": 1, "length": 32768, "way": "loop", "mode": "recorded"}
    some, theirs = {**step, "batch": 8}, {**step, "mode": "transformers"}
    layer = {"batch": 1, "length": 8192, "ratio": 0.9, "even": False, "storage": "full"}
    large = {**layer, "batch": 32, "bytes": 2**29}
    few = {"length": 32768, "layers": 4}
    cells = {
        "decode": [
            {**step, "cache": "AdaKV(SnapKV) 0.9", "of_limit": 1.9, "ms": 7.0},
            {**step, "cache": "AdaKV(SnapKV) 0.9", "of_limit": 1.7, "mode": "compiled"},
            {**step, "cache": "AdaKV(SnapKV) 0.9", "way": "generate()", "ms": 8.0},
            {**theirs, "cache": "DynamicCache", "way": "generate()", "ms": 64},
            {**some, "cache": "AdaKV(SnapKV) 0.75", "ms": 9.0},
            {**some, "cache": "AdaKV(SnapKV) 0.75", "way": "generate()", "ms": 13.5},
            {**some, "cache": "whole, ours", "ms": 18.0},
        ],
        "kernel": [
            {**layer, "of_sdpa": 0.64, "of_copy": 0.3, "bytes": 2**22},
            {**large, "of_sdpa": 0.2, "of_copy": 0.85},
            {**large, "ratio": 0.0, "of_sdpa": 1.1, "of_copy": 0.9},
            {**large, "ratio": 0.0, "of_sdpa": 3.0, "of_copy": 0.1, "storage": "int4"},
        ],
        "parity": [{"equal": True}, {"equal": True}, {"equal": False}, {LINE: NO_TIME}],
        "peaks": [
            {**few, "press": "none", "seconds": 0.2, "peak_mib": 4000.0},
            {**few, "press": "snapkv", "seconds": 0.21, "peak_mib": 4100.0},
            {**few, "press": "cap", "seconds": 0.3, "peak_mib": 4800.0},
            {**few, "press": "kvzip", "seconds": 0.9, "peak_mib": 9000.0},
            {**few, "press": "expected_attention", "seconds": 0.22, "peak_mib": 4000.0},
        ],
        "transformers": [
            {"cache": "StaticCache, compiled", "length": 32768, "ms": 4.0, "mode": "compiled"},
            {"cache": "AdaKV(SnapKV) 0.9", "length": 32768, "ms": 2.0, "mode": "recorded"},
            {"cache": "AdaKV(SnapKV) 0.9", "length": 32768, "ms": 1.6, "mode": "compiled"},
        ],
    }
    sections = {
        name: Section("done", 1.0, {str(i): x for i, x in enumerate(own)})
        for name, own in cells.items()
    }
    found = wanted(Record(sizes=sizes, sections=sections))
    values = [None if one.value is None else round(one.value, 6) for one in found]
    assert values == [
        *(1.9, 1.7, 8.0, 2.5, 2.0, 1.5),
        *(0.64, 0.85, 1.1),
        *(None, 0.05, 0.1, 0.2),
        round(2 / 3, 6),
    ]
    said = ["yes" if met else "no" for met in (1, 0, 1, 1, 1, 0, 1, 1, 1)]
    assert [one.said for one in found] == [*said, "not measured", "no", "yes", "no", "no"]


def test_every_press_of_the_package_is_measured():
    assert {*PRESSES, *UNTAUGHT} == {*own_presses()}
    assert not {*PRESSES} & {*UNTAUGHT}
    for name in PRESSES:
        press = cp.parse(spelled(name, Sizes().few_layers, 8))
        assert type(press).alias == name
    assert spelled("none", 4, 8) is None


def test_the_most_important_comes_first_and_has_most_of_the_time():
    assert list(SECTIONS)[:4] == ["decode", "kernel", "parity", "peaks"]
    first = [(x.batch, x.length) for x in decode_steps(Sizes())]
    order = list(dict.fromkeys(first))
    assert order == [(1, 32768), (8, 32768), (1, 8192)]
    assert allowed("decode", 3.0) == SECTIONS["decode"] / 2
    assert len({x.name for x in decode_steps(Sizes())}) == len(first)


def test_steps_are_taken_as_the_switch_says(monkeypatch):
    said = []

    def both(*, recorded, compile):
        said.append((recorded, compile))

    monkeypatch.setattr(cp, "configure", both)
    for mode, asked in (("compiled", (True, True)), ("eager", (False, False))):
        with pytest.raises(KeyError), stepping(mode):
            raise KeyError
        assert said == [asked, (True, False)]
        said.clear()


def test_replays_are_counted_also_of_what_was_recorded_before(monkeypatch):
    seen = []
    monkeypatch.setattr(lab_module, "_replay", seen.append)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", torch.cuda.CUDAGraph.replay)
    count_replays()
    count_replays()
    graph = object()
    replay, before = partial(torch.cuda.CUDAGraph.replay, graph), replays()
    replay()
    replay()
    assert seen == [graph, graph] and replays() == before + 2


def test_sequences_of_a_batch_have_pairs_of_their_own(tmp_path):
    lab = Lab(job(tmp_path))
    for kind in (WHOLE, ADA_90, DYNAMIC):
        one = cp.size_of(lab.cache(kind, 96))
        three = cp.size_of(lab.cache(kind, 96, 3))
        assert three.bytes_after >= 3 * one.bytes_after
        assert three.pairs_held == 3 * one.pairs_held
        assert lab.cache(kind, 96, 3) is lab.cache(kind, 96, 3)
    # No compressed cache lives while one of transformers' own is measured.
    assert [kind for _, kind in lab._single] == [DYNAMIC]
    assert type(lab.model().config._attn_implementation) is str


def test_a_layer_keeps_uneven_shares_and_decoded_tokens():
    shape = LayerShape(2, 100, 0.5, False)
    keys, values = (torch.randn(2, 8, 100, 128) for _ in range(2))
    lengths = layer_of(shape, keys, values).lengths
    assert lengths.shape == (2, 8)
    assert lengths[0].tolist() == lengths[1].tolist()
    assert lengths[0, 0] == 5 + 4 and lengths[0, -1] == 95 + 4
    assert lengths[0].float().mean() == pytest.approx(54, abs=1)


def test_a_table_has_its_signs_escaped():
    assert table(["a", "b"], [["x|y", "<z>"]]) == ("| a | b |\n| --- | --- |\n| x\\|y | &lt;z> |\n")


def test_the_record_of_a_killed_write_is_the_one_before(tmp_path):
    path = tmp_path / "gpu.json"
    Record(date="today").write(path)
    path.with_name(".x.partial").write_text("{")
    assert Record.read(path).date == "today"
    assert Record.read_if_any(tmp_path / "none.json") is None
    assert json.loads(path.read_text())["sections"] == {}
