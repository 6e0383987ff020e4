"""The command that tries every model type: it goes on, and what it found is what is told."""

import json
import re
from pathlib import Path

import pytest
import transformers

from benchmarks.models import __main__ as command
from benchmarks.models import records
from benchmarks.models.checks import CHECKS, ITSELF, RIGHT
from benchmarks.models.page import DATA, MARK, PAGE, counts_of, page, sentence_of
from benchmarks.models.tiny import EXCEPTIONS, NO_WINDOW, SMALL, config_of, tiny, types

FOUND = json.loads(DATA.read_text(encoding="utf-8"))
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_page_is_what_was_found():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, FOUND) == text
    assert text.count(MARK) == 1
    for kind in FOUND["types"]:
        assert f"| `{kind}`" in text


def test_the_counts_of_the_readme_are_those_of_the_data():
    (said,) = re.findall(r"\*\*(of \d+ [^*]+)\*\*", README.replace("\n", " "))
    assert said == sentence_of(FOUND["types"])


def test_no_type_is_wrong_and_most_work():
    counts = counts_of(FOUND["types"])
    assert counts["wrong"] == 0
    assert counts["works"] >= 140
    if transformers.__version__ == FOUND["transformers"]:
        assert set(FOUND["types"]) == set(types())
    for found in FOUND["types"].values():
        if found["status"] == "works":
            assert set(found["checks"].values()) <= {RIGHT, ITSELF}
            assert list(found["checks"]) == list(CHECKS)
        else:
            assert found["reason"]


def test_a_run_goes_on_where_it_ended(tmp_path, monkeypatch):
    seen = []

    def record(kind, context):
        seen.append(kind)
        found = {"status": "works", "reason": "", "checks": dict.fromkeys(CHECKS, RIGHT)}
        records.path_of(kind).write_text(json.dumps(found))
        return found

    monkeypatch.setattr(records, "RECORDS", tmp_path)
    monkeypatch.setattr(records, "DATA", tmp_path / "models.json")
    monkeypatch.setattr(records, "record", record)
    monkeypatch.setattr(records, "types", lambda: ["llama", "gemma2", "opt"])
    records.check_all(["gemma2"])
    records.check_all([])
    assert seen == ["gemma2", "llama", "opt"]
    records.check_all(["opt"])
    assert seen == ["gemma2", "llama", "opt", "opt"]
    written = json.loads((tmp_path / "models.json").read_text())
    assert list(written["types"]) == ["llama", "gemma2", "opt"]


def test_a_process_that_dies_is_no_work(tmp_path, monkeypatch):
    class Context:
        def Process(self, target, args):
            return self

        def start(self):
            pass

        def join(self, seconds=None):
            pass

        def is_alive(self):
            return False

    monkeypatch.setattr(records, "RECORDS", tmp_path)
    records.path_of("llama").parent.mkdir()
    found = records.record("llama", Context())
    assert found["status"] == "wrong" and "ended after" in found["reason"]


def test_an_unknown_type_is_named(capsys):
    with pytest.raises(SystemExit):
        command.main(["no-such-type"])
    assert "unknown model type 'no-such-type'" in capsys.readouterr().err


def test_a_tiny_model_has_every_kind_of_layer():
    model = tiny("gemma3_text")
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert sum(p.numel() for p in model.parameters()) < 100_000
    text = config_of(type(model.config), {"num_hidden_layers": 2, "layer_types": None})
    assert text.num_hidden_layers == 2 and text.hidden_size == SMALL["hidden_size"]


@pytest.mark.parametrize("kind", [kind for kind, own in EXCEPTIONS.items() if own is NO_WINDOW])
def test_a_type_that_is_tried_without_a_window_has_none(kind):
    assert tiny(kind).config.sliding_window is None
