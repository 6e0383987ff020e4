"""Digests of files: of contents, remembered until a file changes; a commit where there is one."""

import json
import os
import time
from pathlib import Path

import pytest

from cachepress.artefacts import digests
from cachepress.artefacts.digests import digest_of, model_digests
from cachepress.files import _as_listed, real_path, replacing

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEPRESS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def files_read(monkeypatch):
    """The files that were read."""
    found, read = [], digests._read

    def spied(path, bar):
        found.append(path.name)
        return read(path, bar)

    monkeypatch.setattr(digests, "_read", spied)
    return found


def count_as_unchanged(monkeypatch):
    monkeypatch.setattr(digests, "_STABLE_NS", -1)


def folder(path, **contents):
    path.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


def test_a_digest_is_of_names_and_contents(tmp_path):
    one = folder(tmp_path / "a", x="1", y="2")
    files = {p.name: p for p in one.iterdir()}
    same = folder(tmp_path / "b", x="1", y="2")
    assert digest_of(files) == digest_of({p.name: p for p in same.iterdir()})
    assert digest_of(files) != digest_of({"x": one / "y", "y": one / "x"})
    (same / "x").write_text("3")
    assert digest_of(files) != digest_of({p.name: p for p in same.iterdir()})


def test_what_was_read_is_remembered_until_the_file_changes(tmp_path, files_read, monkeypatch):
    count_as_unchanged(monkeypatch)
    path = folder(tmp_path / "a", x="1") / "x"
    first = digest_of({"x": path})
    (tmp_path / "link").symlink_to(path)
    assert digest_of({"x": tmp_path / "link"}) == first
    assert files_read == ["x"]
    before = path.stat()
    time.sleep(0.02)
    path.write_text("2")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest_of({"x": path}) != first  # Same size, inode and time of change as it says.
    assert len(files_read) == 2


def test_a_file_that_was_just_written_is_not_trusted(tmp_path, files_read):
    path = folder(tmp_path / "a", x="1") / "x"
    digest_of({"x": path})
    digest_of({"x": path})
    assert len(files_read) == 2


def test_a_damaged_memory_is_read_anew(tmp_path, home, files_read, monkeypatch):
    count_as_unchanged(monkeypatch)
    path = folder(tmp_path / "a", x="1") / "x"
    first = digest_of({"x": path})
    (remembered,) = (home / "digests").iterdir()
    for content in ("", "rubbish", "é"):
        remembered.write_text(content, encoding="latin-1")
        assert digest_of({"x": path}) == first
    assert len(files_read) == 4


def test_without_a_place_to_remember_it_works(tmp_path, monkeypatch):
    count_as_unchanged(monkeypatch)
    monkeypatch.setenv("CACHEPRESS_HOME", str(folder(tmp_path / "a", x="1") / "x"))
    assert digest_of({"x": tmp_path / "a" / "x"}) == digest_of({"x": tmp_path / "a" / "x"})


def test_a_bar_is_shown_for_much(tmp_path, monkeypatch, capsys):
    path = folder(tmp_path / "a", x="1" * 100) / "x"
    digest_of({"x": path})
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(digests, "_LARGE", 50)
    digest_of({"x": path})
    assert "hashing weights" in capsys.readouterr().err


def parts(path, **changes):
    """Which digests change with a file."""
    before = model_digests(str(path))
    for name, content in changes.items():
        target = path / name.replace("__", ".").replace("_in_", "/")
        target.parent.mkdir(exist_ok=True)
        target.write_text(content)
    after = model_digests(str(path))
    return {name for name in before if before[name] != after[name]}


def test_which_files_count(tmp_path):
    path = folder(
        tmp_path / "m",
        config__json="{}",
        model__safetensors="a",
        tokenizer__json="{}",
        vocab__txt="x",
    )
    assert parts(path, model__safetensors="b") == {"weights"}
    assert parts(path, config__json='{"a": 1}') == {"weights"}
    assert parts(path, generation_config__json="{}") == {"weights"}
    assert parts(path, pytorch_model__bin="x") == {"weights"}
    assert parts(path, modeling_x__py="x") == {"weights"}
    for name in ("tokenizer__json", "vocab__txt", "merges__txt", "tokenizer__model"):
        assert parts(path, **{name: "changed"}) == {"tokenizer"}
    assert parts(path, additional_chat_templates_in_x__jinja="a") == {"tokenizer"}
    assert parts(path, README__md="a", log__txt="a", training_args__bin="a") == set()


def test_shards_in_other_folders_count(tmp_path):
    path = folder(tmp_path / "m", config__json="{}")
    assert model_digests(str(path))["weights"] == "unknown"
    (path / "sub").mkdir()
    (path / "sub" / "1.safetensors").write_text("a")
    index = {"weight_map": {"x": "sub/1.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = model_digests(str(path))
    (path / "sub" / "1.safetensors").write_text("b")
    assert model_digests(str(path))["weights"] != before["weights"]


def test_of_several_gguf_files_the_one_that_is_loaded_counts(tmp_path):
    path = folder(tmp_path / "m", config__json="{}", a__gguf="1", b__gguf="2")
    one = model_digests(str(path), {"gguf_file": "a.gguf"})
    (path / "b.gguf").write_text("3")
    assert model_digests(str(path), {"gguf_file": "a.gguf"}) == one
    assert model_digests(str(path), {"gguf_file": "b.gguf"}) != one


def test_an_adapter_counts_with_what_it_is_put_on(tmp_path):
    base = folder(tmp_path / "base", config__json="{}", model__safetensors="a")
    told = json.dumps({"base_model_name_or_path": str(base)})
    path = folder(tmp_path / "m", adapter_config__json=told, adapter_model__safetensors="b")
    before = model_digests(str(path))
    (base / "model.safetensors").write_text("c")
    assert model_digests(str(path))["weights"] != before["weights"]


def test_adapters_in_a_circle_end(tmp_path):
    def adapter(name, base):
        told = json.dumps({"base_model_name_or_path": str(base)})
        return folder(tmp_path / name, adapter_config__json=told, adapter__safetensors=name)

    one, other = adapter("a", tmp_path / "b"), adapter("b", tmp_path / "b" / ".." / "a")
    alone = adapter("c", tmp_path / "c" / ".." / "c")
    found = [model_digests(str(path))["weights"] for path in (one, other, alone)]
    assert [text.count(" on ") for text in found] == [1, 1, 0]
    (other / "adapter.safetensors").write_text("x")
    assert model_digests(str(one))["weights"] != found[0]


@pytest.mark.parametrize("name", ["adapter_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "{}", '{"weight_map": {"a": 5}}', "null"])
def test_damaged_files_beside_weights_end_nothing(tmp_path, name, text):
    path = folder(tmp_path / "m", model__safetensors="a")
    (path / name).write_text(text)
    first = model_digests(str(path))["weights"]
    (path / "model.safetensors").write_text("b")
    assert len(first) == 64 and model_digests(str(path))["weights"] != first


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a" * 5000, {}),
        ("a\0b", {}),
        ("", {}),
        ("org/name", {"cache_dir": 5, "revision": 7}),
        ("m", {"subfolder": "nothing"}),
        ("m", {"subfolder": 7}),
    ],
)
def test_what_is_nowhere_is_unknown(tmp_path, monkeypatch, name, options):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "m", model__safetensors="a", tokenizer__json="{}")
    assert model_digests(name, options) == {"weights": "unknown", "tokenizer": "unknown"}


def snapshot(root):
    """A model as the hub's cache has it."""
    repository = root / "models--org--name"
    blobs = folder(repository / "blobs", aa="weights", bb="{}")
    place = folder(repository / "snapshots" / COMMIT)
    (place / "model.safetensors").symlink_to(blobs / "aa")
    (place / "config.json").symlink_to(blobs / "bb")
    folder(repository / "refs", main=COMMIT)
    return place


def test_a_snapshot_of_the_hub_is_its_commit(tmp_path, files_read):
    place = snapshot(tmp_path / "hub")
    wanted = {"weights": f"commit {COMMIT}", "tokenizer": f"commit {COMMIT}"}
    assert model_digests(str(place)) == wanted
    assert model_digests("org/name", {"cache_dir": str(tmp_path / "hub")}) == wanted
    assert files_read == []
    (place / "model.safetensors").unlink()
    (place / "model.safetensors").write_text("put there by hand")
    assert model_digests(str(place))["weights"] != f"commit {COMMIT}"
    assert files_read


def test_a_built_in_model_is_what_it_is_made_of(files_read):
    assert "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53" in str(
        model_digests("smollm2-135m")
    )
    assert files_read == []


def test_a_real_path_is_one_for_all_names(tmp_path, monkeypatch):
    path = folder(tmp_path / "a", x="1") / "x"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = (str(path), "a/x", "./a/../a/x", "link", "~/a/x")
    assert {real_path(name) for name in names} == {str(path.resolve())}
    for name in ("org/name", "", "\0", "x" * 5000, "~nobody-here/x"):
        assert real_path(name) == name


def test_letters_are_those_of_the_disk(tmp_path, monkeypatch):
    path = folder(tmp_path / "Data") / "Facts.csv"
    path.write_text("x")
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "samefile", lambda self, other: True)
    assert _as_listed(tmp_path / "data" / "facts.CSV") == path


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]
