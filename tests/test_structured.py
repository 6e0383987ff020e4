"""JSON and YAML that are damaged, or made to harm."""

import json
import time

import pytest

import cachepress as cp
from cachepress.evaluation.config import load_config
from cachepress.evaluation.sweep import load_sweep
from cachepress.structured import parse_json, parse_yaml, read_mapping
from tests.fuzz import BOMB

DEEP = 100_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "holds more than 100,000 values"),
        ("&a [*a]", "unknown or holds itself"),
        ("a: &a {<<: *a}", "unknown or holds itself"),
        ("[" * DEEP, "nested more than 50 deep|maximum nesting depth"),
        ("{a: " * DEEP, "nested more than 50 deep|maximum nesting depth"),
        ("- " * DEEP + "1", "nested more than 50 deep"),
        ("a: " + "9" * 5000, "4300|digits"),
        ("a: 0x" + "f" * 5000, "more than 18 digits"),
        ("0x" + "f" * 900 + ": 1", "more than 18 digits"),
        ("a: 2001-99-99", "month"),
        ("a: 0x_", "invalid literal"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("[]: 1", "unhashable"),
        ("a: \x01", "control characters|not allowed"),
        ("x" * 2**21, "longer than"),
    ],
)
def test_hostile_yaml_is_refused_at_once(text, message):
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)
    assert time.process_time() - start < 5


def test_sensible_yaml_is_read_as_ever():
    text = "base: &base {seed: 3, ratios: [0.25, 1e-3]}\nother: {<<: *base, name: é}\n"
    base = {"seed": 3, "ratios": [0.25, "1e-3"]}
    assert parse_yaml(text) == {"base": base, "other": {**base, "name": "é"}}
    assert parse_yaml("a: 999999999999999999\nb: ~\n") == {"a": 999999999999999999, "b": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * DEEP, "nested too deeply"), ("[" + "9" * 19 + "]", "19 digits"), ("{", "Expecting")],
)
def test_hostile_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    assert parse_json('{"a": [1, -2.5, NaN]}')["a"][:2] == [1, -2.5]


def test_a_file_is_named_with_what_is_wrong(tmp_path):
    path = tmp_path / "a.json"
    for raw, message in (
        (b"[]", "a.json: got \\[\\], wanted an object"),
        (b"\xff", "a.json is damaged, or is not JSON: 'utf-8'"),
        (b"{", "a.json is damaged, or is not JSON: Expecting"),
    ):
        path.write_bytes(raw)
        with pytest.raises(cp.CachepressError, match=message):
            read_mapping(path)
    path.write_text(json.dumps({"é": 1}))
    assert read_mapping(path) == {"é": 1}
    path.unlink()
    path.mkdir()
    with pytest.raises(cp.CachepressError, match="a.json: Is a directory"):
        read_mapping(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("presses: [1]", "presses: got 1, wanted texts"),
        ("ratios: [a]", "ratios: got 'a', wanted numbers"),
        ("datasets: [[a]]", "datasets: got \\['a'\\], wanted texts"),
        ("presses: {a: 1}", "presses: got {'a': 1}, wanted a list"),
        ("workers: 999999999999", "workers: got 999999999999, wanted"),
    ],
)
def test_a_sweep_takes_no_values_that_fail_later(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(cp.CachepressError, match=message):
        load_sweep(str(path), {})


def test_the_command_line_comes_before_either_name_in_a_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("press_name: snapkv\ncompression_ratio: 0.5\n")
    assert load_config(str(path), {}).press == "snapkv"
    assert load_config(str(path), {"press": "knorm"}).press == "knorm"
    assert load_config(str(path), {"press_name": "tova"}).press == "tova"
    path.write_text("press: snapkv\ncompression_ratio: 0.5\n")
    assert load_config(str(path), {"press_name": "tova"}).press == "tova"
