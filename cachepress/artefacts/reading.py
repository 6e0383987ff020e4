"""Reads artefacts, our own or as their authors publish them, and fits them to a model.

No code in a file ever runs: pickles may hold tensors only.
"""

import json
import logging
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cachepress.artefacts.digests import checksum_of
from cachepress.artefacts.published import converted, n_layers, of_layers
from cachepress.errors import CachepressError
from cachepress.hf import n_compressed_layers
from cachepress.hf.types import PreTrainedModel
from cachepress.hf.wiring import full_attention, text_decoder

logger = logging.getLogger(__name__)
_FORMAT = "cachepress-artefact-2"
_EARLIER = "cachepress-artefact"
"""The format of version 0.1.0, without a checksum."""
_OWN_FIELDS = ("checksum", "kind", "model_class", "weights_float32")
"""Metadata fields that only files of ``cachepress train`` have."""
_POINTER = b"version https://git-lfs"


def fitted_layers(path: str, kind: str, model: PreTrainedModel) -> tuple[int, ...] | None:
    """Find the layers of an artefact that are compressed layers of a model.

    Published files have every layer of a model, sliding-window layers included.

    Returns:
        Their indices; None where the artefact has the compressed layers and no others.

    Raises:
        CachepressError: if the artefact has another number of layers, or is none.
    """
    n, full = n_layers(load_artefact(path, kind), kind), full_attention(text_decoder(model).config)
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
    """Read the tensors of an artefact, as ``cachepress train`` names them; a file is read once.

    Args:
        path: the file: our own, or one that was published.
        kind: the kind of artefact.
        device: the device of the tensors.
        layers: which of its layers; None for all.

    Raises:
        CachepressError: if the file is missing, damaged or of another kind.
    """
    try:
        found = Path(path).stat()
    except OSError as error:
        raise CachepressError(f"{path}: {error.strerror}") from error
    # Two writes may have the same time, so the time alone does not tell them apart.
    return _read(path, (found.st_mtime_ns, found.st_ino), kind, str(device), layers)


def check_shapes(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], path: str
) -> None:
    """Raise CachepressError unless the tensors are there and have these shapes."""
    for name, shape in wanted.items():
        got = tuple(tensors[name].shape) if name in tensors else None
        if got != shape:
            raise CachepressError(
                f"{path} does not fit the model: {name} is {got or 'missing'}, wanted {shape}"
            )


def sizes(model: PreTrainedModel) -> tuple[int, int, int, int, int]:
    """Return compressed layers, KV heads, query heads per KV head, head size and hidden size."""
    config = text_decoder(model).config
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    head = getattr(config, "head_dim", None) or config.hidden_size // queries
    return n_compressed_layers(model), keys, queries // keys, head, config.hidden_size


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
        # Published files do not name their kind; those that transformers writes have format "pt".
        ours = metadata.get("format") in (_FORMAT, _EARLIER)
        found = metadata.get("kind", "nothing") if ours else kind
        if found != kind:
            raise CachepressError(f"{path} holds {found}, wanted {kind}")
        tensors = converted(content, kind, path)
        _check_unchanged(metadata, content)
        # Copied: safetensors maps the file into memory, which changes when the file is rewritten.
        return {name: x.to(device, copy=True) for name, x in tensors.items()}
    except CachepressError:
        raise
    except pickle.UnpicklingError as error:
        raise CachepressError(_refusal(path, error)) from error
    except Exception as error:  # A damaged file can raise anything.
        # The rest of torch's message tells how to let a file run its code.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise CachepressError(
            f"{path} is damaged, or no file of tensors (safetensors, .npy, or .pt): {reason}"
        ) from error


def _check_unchanged(metadata: Mapping[str, str], content: object) -> None:
    """Raise ValueError if a file of ``cachepress train`` was changed since it was written."""
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
    """Read a file's content, and its metadata if it is safetensors; its name does not matter."""
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
        # Opened here, since torch would judge a path by its name.
        with Path(path).open("rb") as file, torch.serialization.safe_globals(_PLACEHOLDERS):
            return torch.load(file, map_location="cpu", weights_only=True), {}
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


class _Ignored:
    """Placeholder for objects that published files hold beside tensors, such as a loss curve."""

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
"""Unpickled in place of numpy's objects, which code that the file chooses would construct."""


def _refusal(path: str, error: pickle.UnpicklingError) -> str:
    """Say in one line that a file would run code, or is damaged."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named is None:
        return f"{path} is damaged, or holds more than tensors: get the file anew"
    return (
        f"{path} is refused: reading it would run {named[1]}, and no code in a file ever runs: "
        "wanted a file that holds tensors only"
    )


def _metadata(path: str) -> dict[str, str]:
    """Read the metadata of a safetensors file; empty for other formats and damaged files."""
    with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
        return file.metadata() or {}
    return {}
