import errno
import json
import os

import pytest

import cachepress as cp
from cachepress.evaluation.records import Record, Records, write_atomically

COSTS = {"context_tokens": 3, "prefill_seconds": 0.5, "press_seconds": None, "step_seconds": None}
COSTS |= {"bytes_before": 8, "bytes_after": 4, "rows_seen": 6, "rows_held": 3, "machine": "m"}
COSTS |= {"decode_tokens": 1, "peak_memory_bytes": None}


def record(text="x", **changes):
    values = {"predicted_answer": text, "sample_id": 0, "context_id": 0, **COSTS, **changes}
    return Record(**values)


def line(key="a", **changes):
    return json.dumps({"key": key, **record().to_json(), **changes}).encode() + b"\n"


def test_what_was_appended_is_there_again(tmp_path):
    path = tmp_path / "r.jsonl"
    first = record("é\n", digests={"weights": "w"}, versions={"torch_version": "2"}, kl=-1e-9)
    Records(path).append({"a": first})
    Records(path).append({"b": record("", nll=float("inf"))})
    assert Records(path).done == {"a": first, "b": record("", nll=float("inf"))}
    assert {json.loads(line)["schema"] for line in path.read_text().splitlines()} == {1}


def test_any_character_of_an_answer_survives(tmp_path):
    path = tmp_path / "r.jsonl"
    answer = "line\u2028separator\u2029next\u0085\r\n\x1c\ud7ff\U0001f600"
    Records(path).append({"a": record(answer), "b": record("")})
    assert Records(path).done["a"].predicted_answer == answer
    assert list(Records(path).done) == ["a", "b"]


@pytest.mark.parametrize("cut", [1, 5, 19])
def test_a_half_written_line_is_cut_off(tmp_path, cut):
    path = tmp_path / "r.jsonl"
    records = Records(path)
    records.append({"a": record("x")})
    whole = path.read_bytes()
    records.append({"b": record("y")})
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    again = Records(path)
    assert list(again.done) == ["a"]
    again.append({"b": record("y")})
    assert list(Records(path).done) == ["a", "b"]


@pytest.mark.parametrize(
    "rubbish",
    [
        b"rubbish\n",
        b'{"key": "c", "predicted_answer": "\xff"}\n',
        b'{"key": "c"}\n',
        line().replace(b'"key": "a"', b'"key": 1'),
        line(bytes_after=-1),
        line(bytes_after=True),
        line(bytes_after=10**18),
        line(prefill_seconds=None),
        line(predicted_answer=3),
        line(kl="0.1"),
        line(digests=[]),
    ],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path, rubbish):
    path = tmp_path / "r.jsonl"
    path.write_bytes(line("a") + rubbish + line("b"))
    with pytest.raises(cp.CachepressError, match="line 2 is damaged"):
        Records(path)


def test_a_record_of_a_later_version_is_refused_and_one_without_a_number_is_read(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(line(schema=2))
    with pytest.raises(cp.CachepressError, match="line 1 is damaged: schema: got 2, wanted 1"):
        Records(path)
    earlier = {k: v for k, v in json.loads(line()).items() if k not in ("schema", "versions")}
    path.write_text(json.dumps(earlier) + "\n")
    assert Records(path).done == {"a": record()}


def test_a_damaged_byte_is_no_other_answer(tmp_path):
    path = tmp_path / "r.jsonl"
    Records(path).append({"a": record("é"), "b": record("x")})
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xc3("))
    with pytest.raises(cp.CachepressError, match="line 1 is damaged"):
        Records(path)


def test_a_full_disk_leaves_the_lines_before(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    records = Records(path)
    records.append({"a": record("x")})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        records.append({"b": record("y")})
    assert path.read_bytes() == before
    target = tmp_path / "t"
    target.write_text("old")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.jsonl", "t"]


def test_any_text_comes_back_from_a_record(tmp_path):
    text = "a\0b\r\n\u2028\ud800 \udfff\u241b"
    Records(tmp_path / "r").append({"k": record(text)})
    assert Records(tmp_path / "r").done == {"k": record(text)}
