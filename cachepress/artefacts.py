"""What was learned about a model: found, checked and read.

An artefact is one safetensors file. ``cachepress train`` makes it, here or on another machine;
files that the authors of a method publish are read as they are. No code in a file ever runs.
"""

import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from cachepress.digests import checksum_of, model_digests
from cachepress.errors import CachepressError
from cachepress.files import expanded, replacing
from cachepress.fingerprint import weights_digest
from cachepress.hf import compressed_layers
from cachepress.hf.wiring import full_attention
from cachepress.limits import shown
from cachepress.models.builtin import BUILTIN_MODELS, cache_home
from cachepress.models.loading import hub_answers, resolve
from cachepress.published import converted, n_layers, of_layers

logger = logging.getLogger(__name__)
_FORMAT = "cachepress-artefact-2"
_EARLIER = "cachepress-artefact"
"""The format of version 0.1.0, without a checksum."""
_OWN_FIELDS = ("checksum", "kind", "model_class", "weights_float32")
"""Fields of which files of others have none."""
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_POINTER = b"version https://git-lfs"
_REPOSITORY = r"\w[\w.-]{0,95}/\w[\w.-]{0,95}"
_NAMES = ("{kind}.safetensors", "model.safetensors", "{kind}.npy", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".npy", ".pt", ".pth", ".bin")
_PUBLISHED = {
    "q_filters": "nthngdy/{name}_qfilt",
    "query_stats": "alessiodevoto/exp_att_stats_{owner}_{name}_kmfoda_booksum_100_1000_4",
    "fastkvzip": "Jang-Hyun/Fast-KVzip",
    "kvzap_linear": "nvidia/KVzap-linear-{name}",
    "kvzap_mlp": "nvidia/KVzap-mlp-{name}",
}
"""Where the authors of a method keep what they learned of a model, if they learned it."""


def default_path(kind: str, model: PreTrainedModel) -> Path:
    """Where ``cachepress train`` leaves what it learns of a model.

    Raises:
        CachepressError: if the model came from nowhere.
    """
    if not (name := model_name(model)):
        raise CachepressError(
            f"this {type(model).__name__} has no name under which {kind} could be kept: give the "
            f"path of a file, as from cachepress train {kind} --model MODEL --output FILE"
        )
    return _kept_at(kind, name)


def _kept_at(kind: str, name: str) -> Path:
    folder = Path(name)
    if folder.is_dir():
        # Folders of different models often have the same last part.
        digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
        name = f"{folder.resolve().name}-{digest[:8]}"
    return cache_home() / "learned" / name.replace("/", "--") / f"{kind}.safetensors"


def model_name(model: PreTrainedModel) -> str:
    """What a model is called where it is loaded: a built-in name, a folder, or a name on the hub.

    Empty for a model that came from nowhere.
    """
    return _name_of(model.config.name_or_path or "")


def _name_of(source: str) -> str:
    path = Path(source)
    return path.name if path.name in BUILTIN_MODELS and path.parent == cache_home() else source


def class_of(model: PreTrainedModel) -> str:
    """What kind of model it is; models of several kinds have the same shapes."""
    return type(model.get_decoder()).__name__


def save_artefact(
    path: Path, kind: str, tensors: Mapping[str, Tensor], made_from: Mapping[str, str]
) -> None:
    """Write an artefact, whole or not at all.

    Raises:
        CachepressError: if it cannot be written.
    """
    metadata = {"format": _FORMAT, "kind": kind, **made_from}
    metadata["checksum"] = checksum_of(tensors, json.dumps(metadata, sort_keys=True))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file({k: x.contiguous() for k, x in tensors.items()}, partial, metadata)
    except (OSError, ValueError, SafetensorError) as error:
        raise CachepressError(f"cannot write {path}: {error}") from error


def find_artefact(kind: str, source: str | None, model: PreTrainedModel) -> str:
    """The file of an artefact.

    Args:
        kind: what it is.
        source: a file, a folder that has one, or a hub repository; None for what was trained here.
        model: the model that it is for.

    Raises:
        CachepressError: if there is none, or if it was made for a model of another class; it says
            which command makes one.
    """
    if source is None:
        default_path(kind, model)  # Refuses a model that has no name.
    queries = sizes(model)[2] if kind == "fastkvzip" else None
    path, own = locate_artefact(kind, source, model_name(model), queries), class_of(model)
    hint = _hint(kind, model_name(model))
    made_for = _metadata(path).get("model_class", own)
    if made_for != own:
        raise CachepressError(f"{path} was made for a {made_for}, and this is a {own}: {hint}")
    if not _of_these_weights(_metadata(path), model, path):
        raise CachepressError(
            f"{path} was learned from other weights than those of this {type(model).__name__}: "
            f"{hint}"
        )
    return path


def checkpoint_of(model: PreTrainedModel) -> dict[str, str]:
    """What tells the weights of a model from others, in whichever type they are loaded later."""
    decoder = model.get_decoder()
    told = {f"weights_{name}": weights_digest(decoder, dtype) for name, dtype in _TYPES.items()}
    return {**told, "dtypes": _dtypes(decoder), "files": _files_of(model)}


def _of_these_weights(told: Mapping[str, str], model: PreTrainedModel, path: str) -> bool:
    """Whether an artefact was learned from a model's weights, as far as it says so.

    In one of the types that both can be cast to the weights are equal, bit for bit. Where they are
    not, because they were rounded twice or quantized, they are if they come from the same files.
    """
    types = [name for name in _TYPES if f"weights_{name}" in told]
    if not types:
        if told.get("format") in (_FORMAT, _EARLIER):
            _say_unchecked(path)
        return True
    decoder = model.get_decoder()
    own = _dtypes(decoder)
    for name in sorted(types, key=lambda name: name != own):
        if weights_digest(decoder, _TYPES[name]) == told[f"weights_{name}"]:
            return True
    files = told.get("files", "")
    return bool(files) and own != told.get("dtypes") and files == _files_of(model)


def _dtypes(model: nn.Module) -> str:
    return ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in model.parameters()}))


def _files_of(model: PreTrainedModel) -> str:
    """The digest of the files of a model's weights; empty if it does not come from files."""
    name = model_name(model)
    found = model_digests(name)["weights"] if name else ""
    return "" if found == "unknown" else found


@lru_cache
def _say_unchecked(path: str) -> None:
    logger.info("%s does not say which weights it was learned from: learn it anew to be sure", path)


def locate_artefact(kind: str, source: str | None, name: str, queries: int | None = None) -> str:
    """The file of an artefact, unread.

    Args:
        kind: what it is.
        source: a file, a folder that has one, or a hub repository, where {model} stands for the
            name of the model; None for what was trained here.
        name: what the model is called where it is loaded.
        queries: query heads of each of its KV heads; None to look them up.

    Raises:
        CachepressError: if there is none.
    """
    name = _name_of(name)
    hint = _hint(kind, name)
    if source is None:
        path = _kept_at(kind, name)
        if path.is_file():
            return str(path)
        raise CachepressError(
            f"nothing was learned of {name} for {kind} yet: {hint}{_or_published(kind, name)}"
        )
    source = source.replace("{model}", name.replace("/", "_"))
    given, names = expanded(source), _names(kind, name, queries)
    plain = source.isprintable() and 0 < len(source) <= 1000
    folder, told = Path(given), source if plain else shown(source)
    for path in (given, *(str(folder / name) for name in names)):
        if os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for some texts.
            return str(Path(path))
    there = os.path.exists(given)  # noqa: PTH110
    files = sorted(path for path in folder.glob("*") if path.suffix in _SUFFIXES) if there else []
    if len(files) == 1:
        return str(files[0])
    if files:
        raise CachepressError(
            f"{told} has several files that may be the {kind}: name one, such as {files[0]}"
        )
    if there or folder.is_absolute() or not re.fullmatch(_REPOSITORY, source):
        raise CachepressError(f"{told} has no {names[0]}: {hint}")
    return _from_hub(source, names, hint)


def _hint(kind: str, name: str) -> str:
    return f"make one: cachepress train {kind} --model {name or 'MODEL'}"


def _names(kind: str, model: str, queries: int | None) -> tuple[str, ...]:
    """What the file may be called in a folder or a repository."""
    names = [text.format(kind=kind) for text in _NAMES]
    if kind == "fastkvzip":
        # The published repository holds the gates of all models.
        name = f"q{_queries_of(model) if queries is None else queries}_dim16_sink16.pt"
        names += [f"{Path(model).name.lower()}/{name}", name]
    return tuple(names)


def _queries_of(model: str) -> int | None:
    """Query heads of each KV head, of a model that is not loaded."""
    with suppress(OSError, ValueError, AttributeError, TypeError, CachepressError):
        config = AutoConfig.from_pretrained(
            resolve(model), local_files_only=True, trust_remote_code=False
        ).get_text_config()
        keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return config.num_attention_heads // keys
    return None


def _or_published(kind: str, model: str) -> str:
    owner, _, name = model.partition("/")
    if not name or "/" in name or not owner or kind not in _PUBLISHED:
        return ""
    return f"; or name a published one, such as {_PUBLISHED[kind].format(owner=owner, name=name)}"


def fitted_layers(path: str, kind: str, model: PreTrainedModel) -> tuple[int, ...] | None:
    """Which layers of an artefact are those of a model that are compressed.

    Published files are about every layer of a model, also where some of them keep a window only.

    Returns:
        Their indices; None where the artefact is about these layers and no others.

    Raises:
        CachepressError: if the artefact is about another number of layers, or no artefact.
    """
    n, full = n_layers(load_artefact(path, kind), kind), full_attention(model.get_decoder().config)
    if n == sum(full):
        return None
    if n == len(full):
        return tuple(layer for layer, is_full in enumerate(full) if is_full)
    raise CachepressError(
        f"{path} does not fit the model: it is about {n} layers, wanted {sum(full)}"
    )


def load_artefact(
    path: str,
    kind: str,
    device: torch.device | str = "cpu",
    layers: tuple[int, ...] | None = None,
) -> dict[str, Tensor]:
    """The tensors of an artefact, as ``cachepress train`` names them, read once.

    Args:
        path: the file: our own, or one that was published.
        kind: what it is.
        device: where the tensors are wanted.
        layers: which of its layers; None for all.

    Raises:
        CachepressError: if the file is missing, damaged or of another kind.
    """
    try:
        found = Path(path).stat()
    except OSError as error:
        raise CachepressError(f"{path}: {error.strerror}") from error
    # A clock may stand still between two writes, so the time alone does not tell them apart.
    return _read(path, (found.st_mtime_ns, found.st_ino), kind, str(device), layers)


def check_shapes(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], path: str
) -> None:
    """Raise unless the tensors are there and have these shapes."""
    for name, shape in wanted.items():
        got = tuple(tensors[name].shape) if name in tensors else None
        if got != shape:
            raise CachepressError(
                f"{path} does not fit the model: {name} is {got or 'missing'}, wanted {shape}"
            )


def sizes(model: PreTrainedModel) -> tuple[int, int, int, int, int]:
    """Compressed layers, KV heads, query heads per KV head, head size and hidden size."""
    config = model.get_decoder().config
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    head = getattr(config, "head_dim", None) or config.hidden_size // queries
    return compressed_layers(model), keys, queries // keys, head, config.hidden_size


@lru_cache(maxsize=16)
def _read(
    path: str,
    written: tuple[int, int],
    kind: str,
    device: str,
    layers: tuple[int, ...] | None,
) -> dict[str, Tensor]:
    if layers is not None:
        return of_layers(_read(path, written, kind, device, None), kind, layers)
    try:
        content, metadata = _contents(path)
        # Files of others say nothing of their kind; what transformers writes says "pt".
        ours = metadata.get("format") in (_FORMAT, _EARLIER)
        found = metadata.get("kind", "nothing") if ours else kind
        if found != kind:
            raise CachepressError(f"{path} holds {found}, wanted {kind}")
        tensors = converted(content, kind, path)
        _check_unchanged(metadata, content)
        # Copied, as safetensors maps the file, and what is mapped is lost when others write it.
        return {name: x.to(device, copy=True) for name, x in tensors.items()}
    except CachepressError:
        raise
    except pickle.UnpicklingError as error:
        raise CachepressError(_refusal(path, error)) from error
    except Exception as error:  # What is damaged fails in any way.
        # What torch says further is how to let a file run its code.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise CachepressError(
            f"{path} is damaged, or no file of tensors (safetensors, .npy, or .pt): {reason}"
        ) from error


def _check_unchanged(metadata: Mapping[str, str], content: object) -> None:
    """Raise ValueError if ``cachepress train`` wrote a file that was changed since."""
    told = dict(metadata)
    form, checksum = told.get("format", ""), told.pop("checksum", None)
    if not form.startswith("cachepress") and not any(name in metadata for name in _OWN_FIELDS):
        return
    if form == _EARLIER and checksum is None and "weights_float32" not in told:
        return
    wanted = checksum_of(content, json.dumps(told, sort_keys=True))  # type: ignore
    if form != _FORMAT or checksum != wanted:
        raise ValueError("its content does not match its checksum")


def _contents(path: str) -> tuple[object, dict[str, str]]:
    """What a file holds, and what a safetensors file says of itself; its name does not count."""
    with Path(path).open("rb") as file:
        start = file.read(len(_POINTER))
    if start.startswith(b"\x93NUMPY"):
        array = np.load(path, allow_pickle=False)
        if array.dtype.kind not in "fiu":
            raise CachepressError(f"{path} is damaged: it holds {array.dtype}, wanted numbers")
        return torch.from_numpy(np.asarray(array, dtype=np.float64)), {}
    if start == _POINTER:
        raise CachepressError(f"{path} only points to a file of Git LFS: get that, git lfs pull")
    if start.startswith((b"PK", b"\x80")) and start[8:9] != b"{":
        # Given open, since torch would go by the name of a path.
        with Path(path).open("rb") as file, torch.serialization.safe_globals(_PLACEHOLDERS):
            return torch.load(file, map_location="cpu", weights_only=True), {}
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


class _Ignored:
    """Stands for what a published file holds beside its tensors, such as the curve of a loss."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_PLACEHOLDERS: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
    (_Ignored, f"numpy.{name}")
    for name in (
        "dtype",
        "ndarray",
        "_core.multiarray._reconstruct",
        "_core.multiarray.scalar",
        "core.multiarray._reconstruct",
        "core.multiarray.scalar",
    )
]
"""Read in place of numpy's own, which would be built by code that the file chooses."""


def _refusal(path: str, error: pickle.UnpicklingError) -> str:
    """One line about a file that would run code, or is damaged."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named is None:
        return f"{path} is damaged, or holds more than tensors: get the file anew"
    return (
        f"{path} is refused: reading it would run {named[1]}, and no code in a file ever runs: "
        "wanted a file that holds tensors only"
    )


def _metadata(path: str) -> dict[str, str]:
    """What a file says about itself; nothing where it is of another format, or damaged."""
    with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
        return file.metadata() or {}
    return {}


@lru_cache
def _from_hub(repository: str, names: tuple[str, ...], hint: str) -> str:
    """A file of a repository; one that was fetched before is not asked for again."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in names:
        with suppress(LocalEntryNotFoundError, ValueError):
            return hf_hub_download(repository, name, local_files_only=True)
    if not hub_answers(repository):
        raise CachepressError(
            f"{repository} is not on this machine, and the hub does not answer: {hint}"
        )
    try:
        for name in names[:-1]:
            with suppress(EntryNotFoundError):
                return hf_hub_download(repository, name)
        return hf_hub_download(repository, names[-1])
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CachepressError(
            f"{repository} is neither a file here nor to be had from the hub ({reason}); {hint}"
        ) from error
