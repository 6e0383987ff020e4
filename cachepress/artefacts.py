"""What was learned about a model: found, checked and read.

An artefact is one safetensors file. ``cachepress train`` makes it, here or on another machine.
"""

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from cachepress.errors import CachepressError
from cachepress.hf import compressed_layers
from cachepress.models import BUILTIN_MODELS, cache_home, hub_answers

_FORMAT = "cachepress-artefact"
_REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"
_HUB_NAMES = ("{kind}.safetensors", "model.safetensors")


def default_path(kind: str, model: PreTrainedModel) -> Path:
    """Where ``cachepress train`` leaves what it learns of a model.

    Raises:
        CachepressError: if the model came from nowhere.
    """
    home, name = cache_home(), model_name(model)
    if not name:
        raise CachepressError(
            f"this {type(model).__name__} has no name under which {kind} could be kept: give the "
            f"path of a file, as from cachepress train {kind} --model MODEL --output FILE"
        )
    folder = Path(name)
    if folder.is_dir():
        # Folders of different models often have the same last part.
        digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
        name = f"{folder.resolve().name}-{digest[:8]}"
    return home / "learned" / name.replace("/", "--") / f"{kind}.safetensors"


def model_name(model: PreTrainedModel) -> str:
    """What a model is called where it is loaded: a built-in name, a folder, or a name on the hub.

    Empty for a model that came from nowhere.
    """
    name = model.config.name_or_path or ""
    path = Path(name)
    return path.name if path.name in BUILTIN_MODELS and path.parent == cache_home() else name


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
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: x.contiguous() for k, x in tensors.items()}, partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise CachepressError(f"cannot write {path}: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


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
    name = model_name(model) or "MODEL"
    hint = f"make one: cachepress train {kind} --model {name}"
    path, own = _found(kind, source, model, hint), class_of(model)
    made_for = _metadata(path).get("model_class", own)
    if made_for != own:
        raise CachepressError(f"{path} was made for a {made_for}, and this is a {own}: {hint}")
    return path


def _found(kind: str, source: str | None, model: PreTrainedModel, hint: str) -> str:
    if source is None:
        path = default_path(kind, model)
        if path.is_file():
            return str(path)
        raise CachepressError(f"nothing was learned of {model_name(model)} for {kind} yet: {hint}")
    given = Path(source).expanduser()
    names = tuple(text.format(kind=kind) for text in _HUB_NAMES)
    for path in (given, *(given / name for name in names)):
        if path.is_file():
            return str(path)
    if given.exists() or given.is_absolute() or not re.fullmatch(_REPOSITORY, source):
        raise CachepressError(f"{source} has no {names[0]}: {hint}")
    return _from_hub(source, names, hint)


def load_artefact(path: str, kind: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of an artefact, read once; of a ``.npy`` file the one that it is, by its kind.

    Raises:
        CachepressError: if the file is missing, damaged or of another kind.
    """
    try:
        found = Path(path).stat()
    except OSError as error:
        raise CachepressError(f"{path}: {error.strerror}") from error
    # A clock may stand still between two writes, so the time alone does not tell them apart.
    return _read(path, (found.st_mtime_ns, found.st_ino), kind, str(device))


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


@lru_cache(maxsize=8)
def _read(path: str, written: tuple[int, int], kind: str, device: str) -> dict[str, Tensor]:
    try:
        if path.endswith(".npy"):
            # Published curves say which fraction a head drops, ours which it keeps.
            return {kind: 1 - torch.from_numpy(np.load(path, allow_pickle=False)).to(device)}
        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, EOFError, TypeError, ValueError, SafetensorError) as error:
        raise CachepressError(f"{path} is damaged or not a safetensors file: {error}") from error
    # Files of others say nothing of their kind; what transformers writes says "pt".
    found = metadata.get("kind", kind) if metadata.get("format") == _FORMAT else kind
    if found != kind:
        raise CachepressError(f"{path} holds {found}, wanted {kind}")
    if not all(bool(x.isfinite().all()) for x in tensors.values()):
        raise CachepressError(f"{path} is damaged: it holds numbers that are not finite")
    return tensors


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
        with suppress(EntryNotFoundError):
            return hf_hub_download(repository, names[0])
        return hf_hub_download(repository, names[1])
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CachepressError(
            f"{repository} is neither a file here nor to be had from the hub ({reason}); {hint}"
        ) from error
