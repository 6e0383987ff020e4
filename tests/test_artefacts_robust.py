"""What goes wrong around artefacts: one line, at once, and nothing lost or mixed up."""

import struct
import time
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, safe_open, save_file

import cachepress as cp
from cachepress import train as training
from cachepress.artefacts.kept import default_path, find_artefact
from cachepress.artefacts.reading import load_artefact
from cachepress.cli import main
from cachepress.fits import descend
from cachepress.train import KINDS, Training, train, windows_of
from tests.tiny import tiny, tokenizer, tokens, words

TRAINING = Training(tiny(), [tokens(24)], tokenizer(), quiet=True)


def command(model_dir, tmp_path, *options):
    text = tmp_path / "text.txt"
    text.write_text(words(100))
    return ["train", "q_filters", f"--model={model_dir}", f"--text={text}", "--window=20", *options]


def error_of(arguments, capsys, code=2):
    assert main(arguments) == code
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("cachepress: error: ")
    return err


def test_the_command_leaves_a_file_where_its_press_looks(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CACHEPRESS_HOME", str(tmp_path / "home"))
    assert main(command(model_dir, tmp_path)) == 0
    model = tiny()
    model.config.name_or_path = model_dir
    path = default_path("q_filters", model)
    assert str(path) in capsys.readouterr().out
    ready = cp.QFilterPress(0.5).for_model(model)
    assert ready == cp.QFilterPress(0.5, filters=str(path))
    assert cp.parse(repr(ready)) == ready


def test_a_text_that_is_no_text(model_dir, tmp_path, capsys):
    (tmp_path / "blob").write_bytes(b"\xff\xfe\x00\x81")
    arguments = command(model_dir, tmp_path, f"--text={tmp_path / 'blob'}")
    assert "is not a text in UTF-8" in error_of(arguments, capsys)


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    model_dir, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(KINDS, "q_filters", lambda training: pytest.fail("worked"))
    error_of(command(model_dir, tmp_path, f"--output={tmp_path / 'file' / 'x'}"), capsys)


def test_a_folder_is_a_place(tmp_path):
    path = train("q_filters", TRAINING, str(tmp_path))
    assert path == tmp_path / "q_filters.safetensors"
    assert find_artefact("q_filters", str(tmp_path), TRAINING.model) == str(path)


def test_ctrl_c_loses_nothing(model_dir, tmp_path, monkeypatch, capsys):
    path = tmp_path / "q_filters.safetensors"
    assert main(command(model_dir, tmp_path, f"--output={path}")) == 0
    before = path.read_bytes()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for name in ("prefill", "save_artefact"):
        with monkeypatch.context() as patch:
            patch.setattr(training, name, interrupt)
            err = error_of(
                command(model_dir, tmp_path, f"--output={path}", "--seed=1"), capsys, 130
            )
        assert "interrupted: nothing was written" in err
        assert path.read_bytes() == before
        assert sorted(x.name for x in tmp_path.iterdir()) == [path.name, "text.txt"]


def test_windows_begin_as_a_prompt_does():
    made = tokenizer()
    plain = windows_of(made, words(100), 60, 20, 0)
    assert [x.shape for x in plain] == [(1, 20)] * 3
    made.add_bos_token = True
    made.bos_token = "<bos>"
    begins = made("w3").input_ids[0] == 1
    ours = windows_of(made, words(100), 60, 20, 0)
    assert [x.shape for x in ours] == [(1, 20 + begins)] * 3
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one[:, -20:], other)


def test_numbers_that_are_not_finite_are_damage(tmp_path):
    path = train("q_filters", TRAINING, str(tmp_path))
    tensors = load_file(path)
    tensors["filters"][1, 0, 3] = float("nan")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(cp.CachepressError, match="is damaged: .* not finite"):
        cp.QFilterPress(0.5, filters=str(path)).for_model(tiny())


def test_another_class_of_the_same_shape_is_refused(tmp_path):
    path = str(train("q_filters", TRAINING, str(tmp_path)))
    with pytest.raises(cp.CachepressError, match="made for a LlamaModel, and this is a Mistral"):
        cp.QFilterPress(0.5, filters=path).for_model(tiny("mistral"))


def test_models_of_the_same_last_name_have_places_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEPRESS_HOME", str(tmp_path / "home"))
    places, model = set(), tiny()
    for name in ("one/x", "other/x", str(tmp_path / "one" / "x"), str(tmp_path / "other" / "x")):
        if name.startswith("/"):
            (tmp_path / name).mkdir(parents=True)
        model.config.name_or_path = name
        places.add(default_path("q_filters", model))
    assert len(places) == 4
    model.config.name_or_path = str(tmp_path / "home" / "smollm2-135m")
    assert default_path("q_filters", model).parent.name == "smollm2-135m"
    with pytest.raises(cp.CachepressError, match="train q_filters --model smollm2-135m$"):
        find_artefact("q_filters", None, model)
    model.config.name_or_path = ""
    with pytest.raises(cp.CachepressError, match="has no name"):
        train("q_filters", replace(TRAINING, model=model))


def test_without_a_net_the_hub_is_given_up_at_once(monkeypatch, tmp_path):
    here = {"org/there": str(train("q_filters", TRAINING, str(tmp_path)))}

    def download(repository, name, local_files_only=False):
        assert local_files_only
        if repository in here and name == "model.safetensors":
            return here[repository]
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("cachepress.artefacts.kept.hub_answers", lambda name: False)
    assert find_artefact("q_filters", "org/there", tiny()) == here["org/there"]
    start = time.monotonic()
    with pytest.raises(cp.CachepressError, match="the hub does not answer"):
        find_artefact("q_filters", "org/nowhere", tiny())
    for source in ("./none", "none", "a/b/c", "/none"):
        with pytest.raises(cp.CachepressError, match=f"{source} has no q_filters.safetensors"):
            find_artefact("q_filters", source, tiny())
    assert time.monotonic() - start < 5


def test_descent_takes_what_fits_the_rows_that_it_did_not_see_best():
    targets = torch.cat([torch.ones(90), torch.full((10,), 0.5)])

    def loss(learned, batch):
        return (learned["x"] - targets[batch]).square().mean()

    found = descend({"x": torch.zeros(1)}, loss, 100, 600, seed=0)
    assert float(found["x"]) == pytest.approx(0.5, abs=0.03)


def of(model, path):
    return cp.QFilterPress(0.5, filters=str(path)).for_model(model)


def changed(model):
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[-1, -1] *= 1.5
    return model


def test_an_artefact_of_another_checkpoint_is_refused(tmp_path):
    path = train("q_filters", TRAINING, str(tmp_path))
    assert of(tiny(), path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert of(tiny().to(dtype), path)
        with pytest.raises(cp.CachepressError, match="other weights than those of this Llama"):
            of(changed(tiny()).to(dtype), path)
    model = tiny()
    model.lm_head.weight.data += 1  # No head of the attention depends on it.
    assert of(model, path)


def test_an_artefact_that_was_learned_in_half_precision_fits_the_same_checkpoint(tmp_path):
    half = tiny().bfloat16()
    path = train("q_filters", replace(TRAINING, model=half), str(tmp_path))
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        assert of(tiny().bfloat16().to(dtype), path)
    assert of(tiny(), path)
    with pytest.raises(cp.CachepressError, match="learned from other weights"):
        of(changed(tiny().bfloat16()), path)


def test_the_same_files_are_the_same_weights_however_they_were_rounded(model_dir, tmp_path):
    def loaded(dtype):
        model = tiny().to(dtype)
        model.config.name_or_path = model_dir
        return model

    half = loaded(torch.float16)
    path = train("q_filters", replace(TRAINING, model=half), str(tmp_path))
    assert of(loaded(torch.bfloat16), path)
    other = loaded(torch.bfloat16)
    other.config.name_or_path = ""
    with pytest.raises(cp.CachepressError, match="learned from other weights"):
        of(other, path)


def test_an_artefact_of_0_1_0_is_taken_as_it_is(tmp_path, caplog):
    path = train("q_filters", TRAINING, str(tmp_path))
    with safe_open(path, framework="pt") as file:
        told = {k: file.metadata()[k] for k in ("kind", "model", "model_class", "tokens")}
    told["format"] = "cachepress-artefact"
    save_file(load_file(path), path, told)
    with caplog.at_level("INFO", logger="cachepress"):
        assert of(changed(tiny()), path)
        of(tiny(), path)
    assert caplog.text.count("does not say which weights") == 1


def test_no_flipped_bit_gives_another_artefact(tmp_path):
    path = train("q_filters", TRAINING, str(tmp_path))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    wanted, other = load_artefact(str(path), "q_filters")["filters"], []
    for place in range(0, len(content), 3):
        if place > 8 + length and place % 9:
            continue
        changed = bytearray(content)
        changed[place] ^= 1 << place % 7
        twin = tmp_path / f"{place}.safetensors"
        twin.write_bytes(changed)
        try:
            press = cp.QFilterPress(0.5, filters=str(twin)).for_model(TRAINING.model)
            found = load_artefact(press.filters, "q_filters")["filters"]
        except cp.CachepressError:
            continue
        finally:
            twin.unlink()
        if not torch.equal(found, wanted):
            other.append(place)
    assert not other


def test_metadata_that_was_changed_is_damage(tmp_path):
    path = train("q_filters", TRAINING, str(tmp_path))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for name in metadata:
        for changes in ({name: metadata[name] + "x"}, {name: None}):
            told = {k: v for k, v in {**metadata, **changes}.items() if v is not None}
            save_file(load_file(path), tmp_path / "x.safetensors", told)
            with pytest.raises(cp.CachepressError, match="is damaged|made for|other weights|holds"):
                of(tiny(), tmp_path / "x.safetensors")
