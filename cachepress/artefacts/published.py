"""Converts artefacts as the authors of a method publish them to the layout that presses use.

The names and shapes of a file's tensors, and never the file's name, say which kind of artefact it
is and how it is laid out; anything else is refused with what was found and what was wanted.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cachepress.errors import CachepressError

Tensors = dict[str, Tensor]

LAYOUTS = {
    "q_filters": "filters, or q_filters as published, [layers, KV heads, head size]",
    "query_stats": "mean and covariance, or query_mean and query_cov as published, of each query "
    "head of each layer",
    "fastkvzip": "the stacked gates of cachepress train fastkvzip, or as published a list of gates "
    "(q_proj, k_proj, q_norm, k_norm, k_base, b), one for each layer, under module",
    "kvzap_linear": "layers.N.weight and layers.N.bias for each layer, as model_type 'linear' has "
    "them",
    "kvzap_mlp": "layers.N.0 and layers.N.2, weight and bias, for each layer, as model_type 'mlp' "
    "has them",
    "lukv": "lukv, or one array as published, [99, layers, KV heads]",
}
"""What the file of each kind of artefact holds, for error messages."""

_ROUNDING = 1e-3
_RATIOS = 99
"""Ratios of a curve, from 0.01 to 0.99."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GATES = {
    "q_proj.weight": "q_weight",
    "q_proj.bias": "q_bias",
    "k_proj.weight": "k_weight",
    "q_norm.weight": "q_norm",
    "k_norm.weight": "k_norm",
    "k_base": "base",
    "b": "bias",
}
"""The published names of the parts of a Fast KVzip gate, and the names here."""
_OWN = {
    "q_filters": {"filters"},
    "query_stats": {"mean", "covariance"},
    "fastkvzip": set(GATES.values()),
    "lukv": {"lukv"},
}
_KVZAP = {
    "kvzap_linear": r"layers\.(\d+)\.(weight|bias)",
    "kvzap_mlp": r"layers\.(\d+)\.[02]\.(weight|bias)",
}


def converted(found: object, kind: str, path: str) -> Tensors:
    """Convert the content of a file to the tensors of an artefact.

    Args:
        found: a tensor, or named tensors, or what ``torch.save`` wrote around them.
        kind: the kind of artefact that is wanted.
        path: the file, for error messages.

    Raises:
        CachepressError: if it is of another kind, no artefact, or damaged.
    """
    recognised = _recognised(found)
    if recognised is None:
        own, names = _OWN.get(kind, set()), set(found) if isinstance(found, Mapping) else set()
        if names & own and (missing := sorted(own - names)):
            raise CachepressError(f"{path} is no whole {kind} artefact: {missing[0]} is missing")
        raise CachepressError(
            f"{path} is no {kind} artefact: it holds {_outline(found)}; wanted {LAYOUTS[kind]}"
        )
    if recognised[0] != kind:
        raise CachepressError(f"{path} holds {recognised[0]}, wanted {kind}: {LAYOUTS[kind]}")
    tensors = _checked(recognised[1], path)
    if kind == "lukv":
        _check_fractions(tensors[kind], path)
        # An array without a name was published, and may hold what heads evict.
        return {kind: _kept(tensors[kind])} if isinstance(found, Tensor) else tensors
    return tensors


def _check_fractions(curve: Tensor, path: str) -> None:
    """Raise CachepressError unless the numbers of a file are from 0 to 1, but for rounding."""
    low, high = (float(x) for x in curve.aminmax()) if curve.numel() else (0.0, 0.0)
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise CachepressError(
            f"{path} holds numbers from {low:g} to {high:g}, wanted fractions from 0 to 1"
        )


def _checked(tensors: Tensors, path: str) -> Tensors:
    """Check the tensors of an artefact, and return them.

    Raises:
        CachepressError: unless they are dense arrays of finite floats.
    """
    for name, x in tensors.items():
        if not _is_array(x):
            raise CachepressError(f"{path}: {name} is {_outline(x)}, wanted an array of floats")
        if not bool(x.isfinite().all()):
            raise CachepressError(
                f"{path} is damaged: {name} holds numbers that are not finite: get the file anew"
            )
    return tensors


def n_layers(tensors: Tensors, kind: str) -> int:
    """Count the layers that an artefact has numbers for."""
    if kind in _KVZAP:
        found = (re.fullmatch(_KVZAP[kind], name) for name in tensors)
        return len({match[1] for match in found if match})
    sizes = [x.shape[1 if kind == "lukv" else 0] for x in tensors.values() if x.ndim > 1]
    return min(sizes, default=0)


def of_layers(tensors: Tensors, kind: str, layers: Sequence[int]) -> Tensors:
    """Restrict an artefact to some of its layers."""
    if kind in _KVZAP:
        names = {f"layers.{layer}.": f"layers.{depth}." for depth, layer in enumerate(layers)}
        heads = {name: re.match(r"layers\.\d+\.", name) for name in tensors}
        return {
            names[head[0]] + name[head.end() :]: tensors[name]
            for name, head in heads.items()
            if head and head[0] in names
        }
    some = torch.tensor(layers)
    dim = 1 if kind == "lukv" else 0
    return {name: x.index_select(dim, some.to(x.device)) for name, x in tensors.items()}


def _recognised(found: object) -> tuple[str, Tensors] | None:
    """Recognise the kind of an artefact, and name its tensors as they are named here."""
    if isinstance(found, Tensor):
        is_curve = _is_array(found) and found.ndim == 3 and len(found) == _RATIOS
        return ("lukv", {"lukv": found}) if is_curve else None
    if isinstance(found, Mapping) and isinstance(found.get("module"), list):
        found = found["module"]
    if isinstance(found, list):
        return _gates(found)
    if not isinstance(found, Mapping) or not all(map(_is_array, found.values())):
        return None
    return _by_name({str(name): x.detach() for name, x in found.items()})


def _by_name(tensors: Tensors) -> tuple[str, Tensors] | None:
    """Recognise an artefact by the names of its tensors, and name them as ours."""
    names = set(tensors)
    if names == {"q_filters"}:
        # Published filters point away from the queries.
        return "q_filters", {"filters": -tensors["q_filters"]}
    if names == {"query_mean", "query_cov"}:
        return "query_stats", {"mean": tensors["query_mean"], "covariance": tensors["query_cov"]}
    for kind, own in _OWN.items():
        if names == own:
            return kind, tensors
    for kind, pattern in _KVZAP.items():
        if names and all(re.fullmatch(pattern, name) for name in names):
            return kind, tensors
    return None


def _gates(layers: list[object]) -> tuple[str, Tensors] | None:
    """Stack the Fast KVzip gates of all layers; None if these are no such gates."""
    for gate in layers:
        if not isinstance(gate, Mapping) or set(gate) != set(GATES):
            return None
        if not all(map(_is_array, gate.values())):
            return None
    if not layers:
        return None
    gates = [{ours: gate[name].detach() for name, ours in GATES.items()} for gate in layers]  # type: ignore
    if any({k: x.shape for k, x in gate.items()} != _shapes(gates[0]) for gate in gates):
        return None
    stacked = {name: torch.stack([gate[name] for gate in gates]) for name in gates[0]}
    for name in ("base", "bias"):  # [L, H, 1, ...]
        if stacked[name].ndim > 2 and stacked[name].shape[2] == 1:
            stacked[name] = stacked[name].squeeze(2)
    return "fastkvzip", stacked


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in tensors.items()}


def _kept(curve: Tensor) -> Tensor:
    """Turn a LUKV curve into the fractions of pairs that heads keep.

    Published curves hold the fractions that heads evict, which grow with the ratio.
    """
    means = curve.double().flatten(1).mean(1)
    return curve if bool(means[-1] < means[0]) else 1 - curve


def _is_array(x: object) -> bool:
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        return False
    return x.dtype in _FLOATS and not x.is_meta


def _outline(found: object) -> str:
    """Describe the content of a file in a few words, for error messages."""
    if isinstance(found, Tensor):
        return f"an array of {str(found.dtype).removeprefix('torch.')}, {tuple(found.shape)}"
    if isinstance(found, Mapping):
        parts = [f"{str(name)[:40]} ({_outline(x)})" for name, x in list(found.items())[:3]]
        return ", ".join([*parts, "..."] if len(found) > 3 else parts) or "nothing"
    if isinstance(found, list | tuple):
        first = f" of {_outline(found[0])}" if found else ""
        return f"a list of {len(found)}{first}"[:200]
    return f"a {type(found).__name__}"
