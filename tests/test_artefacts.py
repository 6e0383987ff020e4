"""Where artefacts are found, and what is said of those that are no use."""

import os
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, safe_open, save_file

import cachepress as cp
from cachepress.artefacts.kept import default_path, find_artefact, locate_artefact, save_artefact
from cachepress.artefacts.reading import check_shapes, load_artefact, sizes
from tests.tiny import tiny

MADE_FROM = {"model": "tiny", "tokens": "9"}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "some" / "folder" / "q_filters.safetensors"
    save_artefact(path, "q_filters", {"filters": drawn(4, 2, 8)}, MADE_FROM)
    return path


def test_what_is_saved_is_loaded_and_says_what_it_was_made_from(saved):
    assert torch.equal(load_artefact(str(saved), "q_filters")["filters"], drawn(4, 2, 8))
    with safe_open(saved, framework="pt") as file:
        told = file.metadata()
    assert len(told.pop("checksum")) == 64
    assert told == {"format": "cachepress-artefact-2", "kind": "q_filters"} | MADE_FROM
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_tensors_that_are_not_contiguous_are_saved_as_they_look(tmp_path):
    path = tmp_path / "x.safetensors"
    save_artefact(path, "x", {"a": drawn(3, 5).mT, "b": drawn(1, 2).expand(4, 2)}, {})
    found = load_file(path)
    assert torch.equal(found["a"], drawn(3, 5).mT)
    assert torch.equal(found["b"], drawn(1, 2).repeat(4, 1))


def test_a_file_and_its_folder_are_the_same_source(saved, model):
    assert find_artefact("q_filters", str(saved), model) == str(saved)
    assert find_artefact("q_filters", str(saved.parent), model) == str(saved)


def test_a_folder_in_the_layout_of_the_hub_has_model_safetensors(tmp_path, model):
    save_file({"x": drawn(2)}, tmp_path / "model.safetensors")
    assert find_artefact("kvzap_mlp", str(tmp_path), model) == str(tmp_path / "model.safetensors")
    save_file({"x": drawn(2)}, tmp_path / "kvzap_mlp.safetensors")
    own = str(tmp_path / "kvzap_mlp.safetensors")
    assert find_artefact("kvzap_mlp", str(tmp_path), model) == own


def test_the_home_folder_is_that_of_the_user(saved, model, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parents[2]))
    found = find_artefact("q_filters", "~/some/folder", model)
    assert found == str(saved)


def test_the_default_place_is_by_model_below_the_home_of_cachepress(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEPRESS_HOME", str(tmp_path))
    model = tiny()
    model.config.name_or_path = "org/some-model"
    path = tmp_path / "learned" / "org--some-model" / "lukv.safetensors"
    assert default_path("lukv", model) == path
    with pytest.raises(cp.CachepressError) as error:
        find_artefact("lukv", None, model)
    message = str(error.value)
    assert "nothing was learned of org/some-model for lukv yet" in message
    assert "cachepress train lukv --model org/some-model" in message
    save_artefact(path, "lukv", {"lukv": drawn(1)}, {})
    assert find_artefact("lukv", None, model) == str(path)
    model.config.name_or_path = ""
    with pytest.raises(cp.CachepressError, match="cachepress train lukv --model MODEL"):
        find_artefact("lukv", None, model)


def test_a_place_without_the_file_says_what_to_do(tmp_path, model):
    name = model.config.name_or_path
    for place in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(cp.CachepressError) as error:
            find_artefact("q_filters", str(place), model)
        message = str(error.value)
        assert message.startswith(f"{place} has no q_filters.safetensors")
        assert f"cachepress train q_filters --model {name}" in message
        assert "\n" not in message


@pytest.mark.parametrize("source", ["x" * 5000, "x/" + "y" * 300, "a\nb/c", "\0", "~nobody-here/x"])
def test_a_text_that_can_be_no_place_is_one_short_line(source):
    with pytest.raises(
        cp.CachepressError, match=r"has no q_filters\.safetensors: make one"
    ) as error:
        locate_artefact("q_filters", source, "owner/name")
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize("source", [3, "", ["a"], Path("a")])
def test_what_names_no_place_is_refused_when_the_press_is_made(source):
    for kind, option in (
        (cp.QFilterPress, "filters"),
        (cp.KVzapPress, "surrogate"),
        (cp.FastKVzipPress, "gates"),
        (cp.LUKVPress, "curve"),
        (cp.ExpectedAttentionStatsPress, "stats"),
    ):
        with pytest.raises(cp.CachepressError, match=f"{option}: got .*, wanted a file, a folder"):
            kind(**{option: source})


def test_what_is_no_place_here_is_asked_of_the_hub(model, monkeypatch):
    asked = []

    def download(repository, name, local_files_only=False):
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        asked.append((repository, name))
        if name == "model.safetensors":
            return "/there/model.safetensors"
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("cachepress.artefacts.kept.hub_answers", lambda name: True)
    assert find_artefact("kvzap_mlp", "org/none-here-4", model) == "/there/model.safetensors"
    assert asked == [
        ("org/none-here-4", "kvzap_mlp.safetensors"),
        ("org/none-here-4", "model.safetensors"),
    ]


def test_a_hub_that_does_not_answer_is_one_line(model, monkeypatch):
    def download(repository, name, local_files_only=False):
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        raise OSError("no answer\nand much more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("cachepress.artefacts.kept.hub_answers", lambda name: True)
    with pytest.raises(cp.CachepressError) as error:
        find_artefact("kvzap_mlp", "org/none-here-5", model)
    message = str(error.value)
    assert message.startswith("org/none-here-5 is neither a file here nor to be had from the hub")
    assert "(no answer)" in message and "cachepress train kvzap_mlp --model" in message
    assert "\n" not in message


def test_another_kind_is_refused(saved):
    with pytest.raises(cp.CachepressError, match="holds q_filters, wanted lukv"):
        load_artefact(str(saved), "lukv")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_files_of_others_are_known_by_what_they_hold(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    linear = {"layers.0.weight": drawn(2, 3), "layers.0.bias": drawn(2)}
    save_file(linear, path, metadata)
    found = load_artefact(str(path), "kvzap_linear")
    assert found.keys() == linear.keys()
    assert all(torch.equal(found[name], linear[name]) for name in linear)
    save_file({"x": drawn(2)}, path, metadata)
    with pytest.raises(cp.CachepressError) as error:
        load_artefact(str(path), "kvzap_linear")
    message = f"{path} is no kvzap_linear artefact: it holds x (an array of float32, (2,)); wanted"
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["a.safetensors", "a.npy"])
@pytest.mark.parametrize("content", ["empty", "text", "half"])
def test_damage_is_named(saved, tmp_path, name, content):
    path = tmp_path / name
    half = saved.read_bytes()[:-9]
    if name == "a.npy":
        np.save(path, np.ones((3, 4)))
        half = path.read_bytes()[:-9]
    path.write_bytes({"empty": b"", "text": b"no tensors at all", "half": half}[content])
    with pytest.raises(cp.CachepressError, match="a[.].* is damaged, or no file of tensors"):
        load_artefact(str(path), "q_filters")


def test_objects_in_a_npy_file_are_never_unpickled(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(cp.CachepressError, match="is damaged"):
        load_artefact(str(path), "lukv")
    np.save(path, np.array(["text"]))
    with pytest.raises(cp.CachepressError, match="is damaged"):
        load_artefact(str(path), "lukv")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(cp.CachepressError, match="gone.safetensors: No such file or directory"):
        load_artefact(str(tmp_path / "gone.safetensors"), "lukv")


@pytest.mark.parametrize("rises", [True, False])
def test_an_array_is_a_curve_and_read_as_what_heads_keep(tmp_path, rises):
    """What heads evict grows with the ratio, what they keep falls."""
    path = tmp_path / "curve.npy"
    kept = 1 - torch.arange(1, 100)[:, None, None] / 100 * drawn(1, 4, 2).sigmoid().double()
    np.save(path, (1 - kept if rises else kept).numpy())
    found = load_artefact(str(path), "lukv")
    assert list(found) == ["lukv"]
    torch.testing.assert_close(found["lukv"], kept, atol=1e-12, rtol=0)


def test_shapes_are_checked(saved):
    found = load_artefact(str(saved), "q_filters")
    check_shapes(found, {"filters": (4, 2, 8)}, str(saved))
    with pytest.raises(cp.CachepressError) as error:
        check_shapes(found, {"filters": (4, 2, 9)}, str(saved))
    message = f"{saved} does not fit the model: filters is (4, 2, 8), wanted (4, 2, 9)"
    assert str(error.value) == message
    with pytest.raises(cp.CachepressError, match="bias is missing, wanted [(]3,[)]"):
        check_shapes(found, {"bias": (3,)}, str(saved))


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(cp.CachepressError, match="cannot write .*file/x.safetensors"):
        save_artefact(file / "x.safetensors", "x", {"x": drawn(2)}, {})
    folder = tmp_path / "x.safetensors"
    (folder / "full").mkdir(parents=True)
    with pytest.raises(cp.CachepressError, match="cannot write .*x.safetensors"):
        save_artefact(folder, "x", {"x": drawn(2)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "x.safetensors"]


def test_a_file_that_fails_half_way_leaves_the_old_one(saved, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cachepress.artefacts.kept.save_file", full)
    with pytest.raises(cp.CachepressError, match="No space left on device"):
        save_artefact(saved, "q_filters", {"filters": drawn(1)}, {})
    assert torch.equal(load_artefact(str(saved), "q_filters")["filters"], drawn(4, 2, 8))


def test_a_file_is_read_once_and_anew_when_it_was_written_anew(saved):
    first = load_artefact(str(saved), "q_filters")
    assert load_artefact(str(saved), "q_filters") is first
    written = saved.stat().st_mtime_ns
    save_artefact(saved, "q_filters", {"filters": drawn(4, 2, 8, seed=1)}, MADE_FROM)
    os.utime(saved, ns=(written, written))
    second = load_artefact(str(saved), "q_filters")["filters"]
    assert torch.equal(second, drawn(4, 2, 8, seed=1))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("llama", (4, 2, 2, 8, 32)), ("gpt2", (4, 4, 1, 8, 32)), ("gemma2", (2, 2, 2, 8, 32))],
)
def test_sizes_are_those_of_the_compressed_layers(name, wanted):
    assert sizes(tiny(name)) == wanted


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "/" + "x" * 5000, "x" * 300 + "/y"])
def test_a_source_that_no_disk_takes_is_refused(model, source):
    with pytest.raises(cp.CachepressError, match="train q_filters") as refused:
        find_artefact("q_filters", source, model)
    assert "\n" not in str(refused.value)
