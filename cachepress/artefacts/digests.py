"""Digests of the files of models and artefacts, which tell them from others of the same name."""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from tqdm import tqdm

from cachepress.errors import CachepressError
from cachepress.files import real_path, replacing
from cachepress.models.builtin import builtin_digest, cache_home

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_SETTINGS = (".json", ".jinja", ".model", ".py", ".tiktoken", ".spm", ".bpe", ".vocab")
_WORDS = ("vocab.txt", "merges.txt")
_OF_THE_MODEL = ("config.json", "generation_config.json", "adapter_config.json")
_OF_TRAINING = re.compile(
    r"trainer_state\.json|training_args\.bin|(train|eval|test|all)_results\.json"
    r"|(optimizer|scheduler|scaler|rng_state)[\w.-]*\.(pt|pth|bin|safetensors)"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LARGE = 10**9
_PIECE = 1 << 22
_STABLE_NS = 2 * 10**9
"""A file that changed less than this ago can change again without another time of change."""


def digest_of(files: Mapping[str, Path]) -> str:
    """Hash the names and contents of some files (SHA-256).

    The digest of a file is remembered in the user's cache until the file changes. Reading large
    files shows a progress bar.

    Args:
        files: the files, by the names that are hashed with them.
    """
    places = {name: Path(os.path.realpath(path)) for name, path in files.items()}
    remembered = {name: _remembered(path) for name, path in places.items()}
    unread = [name for name, digest in remembered.items() if digest is None]
    total = sum(places[name].stat().st_size for name in unread)
    with tqdm(
        total=total,
        desc="hashing weights, once",
        unit="B",
        unit_scale=True,
        disable=total <= _LARGE,
    ) as bar:
        found = {name: remembered[name] or _read(path, bar) for name, path in places.items()}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def model_digests(name: str, model_kwargs: Mapping[str, object] | None = None) -> dict[str, str]:
    """Return digests of a model's ``weights`` (with their config) and ``tokenizer``.

    They are the commit for a snapshot of the hub, the hash of its source for a built-in model, else
    a SHA-256 of the files. ``unknown`` where the model is not on this machine.

    Args:
        name: a built-in name, a folder, or a name on the hub.
        model_kwargs: arguments of ``from_pretrained`` that say where files come from.
    """
    return _model_digests(name, model_kwargs or {}, frozenset())


def checksum_of(tensors: Mapping[str, Tensor], header: str) -> str:
    """Hash a header, and the name, type, shape and bits of every tensor (SHA-256)."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous().cpu()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_digests(files: Iterable[Path]) -> str | None:
    """Hash some files in their order, without their names; None for no file."""
    named = {str(i): path for i, path in enumerate(files)}
    return digest_of(named) if named else None


def _model_digests(
    name: str, options: Mapping[str, object], above: frozenset[str]
) -> dict[str, str]:
    """Return ``model_digests`` of a base model, on which the adapters in ``above`` are put.

    Folders in ``above`` are not entered again: adapters may name each other as their base.
    """
    if (own := builtin_digest(name)) is not None:
        return {"weights": own, "tokenizer": own}
    source = Path(name) if os.path.isdir(name) else _snapshot(name, options)  # noqa: PTH112
    folder = None if source is None else source / str(options.get("subfolder") or "")
    if folder is None or not folder.is_dir():
        return {"weights": "unknown", "tokenizer": "unknown"}
    if (commit := _commit(folder)) is not None:
        return {"weights": commit, "tokenizer": commit}
    return _contents(folder, options.get("gguf_file"), above)


def _contents(folder: Path, gguf: object, above: frozenset[str]) -> dict[str, str]:
    weights, tokenizer = _listed(folder), {}
    templates = (folder / "additional_chat_templates").glob("*.jinja")
    for path in sorted([*folder.iterdir(), *templates]):
        name = path.name
        if name.startswith(".") or _OF_TRAINING.fullmatch(name) or not path.is_file():
            continue
        if path.suffix in _WEIGHTS:
            if gguf is None or name == gguf:
                weights[name] = path
        elif name in _OF_THE_MODEL or name.endswith(".index.json") or path.suffix == ".py":
            weights[name] = path
        elif path.suffix in _SETTINGS or name in _WORDS:
            tokenizer[str(path.relative_to(folder))] = path
    if not any(Path(name).suffix in _WEIGHTS for name in weights):
        return {"weights": "unknown", "tokenizer": digest_of(tokenizer)}
    base, above = _base_of(folder), above | {real_path(str(folder))}
    below = ""
    if base is not None and real_path(base) not in above:
        below = f" on {_model_digests(base, {}, above)['weights']}"
    return {"weights": digest_of(weights) + below, "tokenizer": digest_of(tokenizer)}


def _listed(folder: Path) -> dict[str, Path]:
    """Find the weight files that an index names, which may be in subfolders."""
    found: dict[str, Path] = {}
    for index in folder.glob("*.index.json"):
        with suppress(OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            found |= {name: folder / name for name in names if (folder / name).is_file()}
    return found


def _base_of(folder: Path) -> str | None:
    """Return the model that an adapter in the folder is put on; None if there is none."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        told = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = told["base_model_name_or_path"]
        return base if isinstance(base, str) else None
    return None


def _snapshot(name: str, options: Mapping[str, object]) -> Path | None:
    """Find the folder of a model's snapshot in the hub's cache."""
    where = {key: options[key] for key in ("cache_dir", "revision") if options.get(key)}
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        inside = f"{options['subfolder']}/{file}" if options.get("subfolder") else file
        with suppress(ValueError, OSError, TypeError):
            # Only what is on this machine: loading has already asked the hub.
            found = try_to_load_from_cache(name, inside, **where)  # pyright: ignore
            if isinstance(found, str):
                return Path(found.removesuffix(inside))
    return None


def _commit(folder: Path) -> str | None:
    """Return the commit of a snapshot in the hub's cache, if no file was put there by hand."""
    parts = Path(os.path.realpath(folder)).parts
    for i, part in enumerate(parts[2:], start=2):
        if parts[i - 1] != "snapshots" or not _COMMIT.fullmatch(part):
            continue
        if parts[i - 2].startswith("models--"):
            root = Path(*parts[: i - 1])
            blobs = root / "blobs"
            files = [path for path in Path(*parts[: i + 1]).rglob("*") if path.is_file()]
            untouched = all(path.resolve().parent == blobs for path in files)
            return f"commit {part}" if files and untouched else None
    return None


def _mark(path: Path) -> tuple[str, int]:
    """Return a text that changes whenever the file does, and the time of its last change."""
    found = path.stat()
    numbers = (found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)
    return "\n".join(map(str, (path, *numbers))), found.st_ctime_ns


def _place(mark: str) -> Path:
    return cache_home() / "digests" / hashlib.sha256(mark.encode()).hexdigest()


def _remembered(path: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError, CachepressError):
        found = _place(_mark(path)[0]).read_text(encoding="ascii")
        if re.fullmatch("[0-9a-f]{64}", found):
            return found
    return None


def _read(path: Path, bar: tqdm) -> str:
    """Hash a file, and remember the digest if a later change of the file would show."""
    mark, changed = _mark(path)
    stable = time.time_ns() - changed > _STABLE_NS
    digest, piece = hashlib.sha256(), bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(piece):
            digest.update(memoryview(piece)[:n])
            bar.update(n)
    found = digest.hexdigest()
    if stable and mark == _mark(path)[0]:
        with suppress(OSError, CachepressError):
            place = _place(mark)
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as partial:
                partial.write_text(found, encoding="ascii")
    return found
