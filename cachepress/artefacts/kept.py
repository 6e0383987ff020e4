"""Finds, checks and writes artefacts: what a method learned of a model.

An artefact is one safetensors file. ``cachepress train`` makes it, here or on another machine;
files that the authors of a method publish are read as they are (``cachepress.artefacts.reading``).
No code in a file ever runs.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from cachepress.artefacts.digests import checksum_of, model_digests
from cachepress.artefacts.fingerprint import weights_digest
from cachepress.artefacts.reading import _EARLIER, _FORMAT, _metadata, sizes
from cachepress.errors import CachepressError
from cachepress.files import expanded, replacing
from cachepress.hf.types import PreTrainedModel
from cachepress.hf.wiring import text_decoder
from cachepress.limits import shown
from cachepress.models.builtin import BUILTIN_MODELS, cache_home, learned_home
from cachepress.models.loading import groups_of, hub_answers

logger = logging.getLogger(__name__)
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
"""The hub repositories in which authors of methods publish artefacts, for some models."""


def default_path(kind: str, model: PreTrainedModel) -> Path:
    """Return where ``cachepress train`` writes an artefact of a model by default.

    Raises:
        CachepressError: if the model was not loaded from anywhere.
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
    return learned_home() / name.replace("/", "--") / f"{kind}.safetensors"


def model_name(model: PreTrainedModel) -> str:
    """Return the name that a model was loaded by: a built-in name, a folder, or a name on the hub.

    Empty for a model that was not loaded from anywhere.
    """
    return _name_of(model.config.name_or_path or "")


def _name_of(source: str) -> str:
    path = Path(source)
    return path.name if path.name in BUILTIN_MODELS and path.parent == cache_home() else source


def class_of(model: PreTrainedModel) -> str:
    """Return a model's decoder class: models of different classes may have the same shapes."""
    return type(text_decoder(model)).__name__


def save_artefact(
    path: Path, kind: str, tensors: Mapping[str, Tensor], made_from: Mapping[str, str]
) -> None:
    """Write an artefact; if writing fails there is no file.

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
    """Find the file of an artefact for a model, and check that it was learned of that model.

    Args:
        kind: the kind of artefact.
        source: a file, a folder that has one, or a hub repository; None for what was trained here.
        model: the model that it is for.

    Raises:
        CachepressError: if there is none, or if it was learned of another class or other weights;
            it says which command makes one.
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
    """Return digests of a model's weights in every type in which they may be loaded later."""
    decoder = text_decoder(model)
    told = {f"weights_{name}": weights_digest(decoder, dtype) for name, dtype in _TYPES.items()}
    return {**told, "dtypes": _dtypes(decoder), "files": _files_of(model)}


def _of_these_weights(told: Mapping[str, str], model: PreTrainedModel, path: str) -> bool:
    """Tell whether an artefact was learned of a model's weights, as far as it says so.

    They are the same if they are equal, bit for bit, in one of the types that both can be cast to.
    Weights that were rounded twice or quantised never are; these count as the same if they come
    from the same files.
    """
    types = [name for name in _TYPES if f"weights_{name}" in told]
    if not types:
        if told.get("format") in (_FORMAT, _EARLIER):
            _say_unchecked(path)
        return True
    decoder = text_decoder(model)
    own = _dtypes(decoder)
    for name in sorted(types, key=lambda name: name != own):
        if weights_digest(decoder, _TYPES[name]) == told[f"weights_{name}"]:
            return True
    files = told.get("files", "")
    return bool(files) and own != told.get("dtypes") and files == _files_of(model)


def _dtypes(model: nn.Module) -> str:
    return ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in model.parameters()}))


def _files_of(model: PreTrainedModel) -> str:
    """Return the digest of a model's weight files; empty if it was not loaded from files."""
    name = model_name(model)
    found = model_digests(name)["weights"] if name else ""
    return "" if found == "unknown" else found


@lru_cache
def _say_unchecked(path: str) -> None:
    logger.info("%s does not say which weights it was learned from: learn it anew to be sure", path)


def locate_artefact(kind: str, source: str | None, name: str, queries: int | None = None) -> str:
    """Find the file of an artefact without reading it.

    Args:
        kind: the kind of artefact.
        source: a file, a folder that has one, or a hub repository, where {model} stands for the
            name of the model; None for what was trained here.
        name: the name that the model is loaded by.
        queries: query heads of each of its KV heads; None to read them from its config.

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
    """List the names that the file may have in a folder or a repository."""
    names = [text.format(kind=kind) for text in _NAMES]
    if kind == "fastkvzip":
        # The published repository holds the gates of all models.
        name = f"q{groups_of(model) if queries is None else queries}_dim16_sink16.pt"
        names += [f"{Path(model).name.lower()}/{name}", name]
    return tuple(names)


def _or_published(kind: str, model: str) -> str:
    owner, _, name = model.partition("/")
    if not name or "/" in name or not owner or kind not in _PUBLISHED:
        return ""
    return f"; or name a published one, such as {_PUBLISHED[kind].format(owner=owner, name=name)}"


@lru_cache
def _from_hub(repository: str, names: tuple[str, ...], hint: str) -> str:
    """Download a file of a hub repository, unless it was downloaded before."""
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
