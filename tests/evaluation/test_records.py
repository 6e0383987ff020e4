import errno
import os

import pytest

import cachepress as cp
from cachepress.evaluation.records import Records, write_atomically


def test_what_was_appended_is_there_again(tmp_path):
    path = tmp_path / "r.jsonl"
    Records(path).append({"a": {"answers": ["é\n", "x"]}})
    Records(path).append({"b": {"answers": []}})
    assert Records(path).done == {"a": {"answers": ["é\n", "x"]}, "b": {"answers": []}}


def test_any_character_of_an_answer_survives(tmp_path):
    path = tmp_path / "r.jsonl"
    answer = "line\u2028separator\u2029next\u0085\r\n\x1c\ud7ff\U0001f600"
    Records(path).append({"a": {"predicted_answer": answer}, "b": {"predicted_answer": ""}})
    assert Records(path).done["a"]["predicted_answer"] == answer
    assert list(Records(path).done) == ["a", "b"]


@pytest.mark.parametrize("cut", [1, 5, 19])
def test_a_half_written_line_is_cut_off(tmp_path, cut):
    path = tmp_path / "r.jsonl"
    records = Records(path)
    records.append({"a": {"answers": ["x"]}})
    whole = path.read_bytes()
    records.append({"b": {"answers": ["y"]}})
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    again = Records(path)
    assert list(again.done) == ["a"]
    again.append({"b": {"answers": ["y"]}})
    assert list(Records(path).done) == ["a", "b"]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    for rubbish in (b"rubbish", b'{"key": "c", "predicted_answer": "\xff"}'):
        path.write_bytes(b'{"key": "a"}\n%s\n{"key": "b"}\n' % rubbish)
        with pytest.raises(cp.CachepressError, match="line 2 is damaged"):
            Records(path)


def test_a_damaged_byte_is_no_other_answer(tmp_path):
    path = tmp_path / "r.jsonl"
    Records(path).append({"a": {"answer": "é"}, "b": {"answer": "x"}})
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xc3("))
    with pytest.raises(cp.CachepressError, match="line 1 is damaged"):
        Records(path)


def test_a_full_disk_leaves_the_lines_before(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    records = Records(path)
    records.append({"a": {"answers": ["x"]}})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        records.append({"b": {"answers": ["y"]}})
    assert path.read_bytes() == before
    target = tmp_path / "t"
    target.write_text("old")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.jsonl", "t"]


def test_any_text_comes_back_from_a_record(tmp_path):
    text = "a\0b\r\n\u2028\ud800 \udfff\u241b"
    Records(tmp_path / "r").append({"k": {"predicted_answer": text}})
    assert Records(tmp_path / "r").done == {"k": {"predicted_answer": text}}
