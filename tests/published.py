"""Artefacts of the tiny Llama, written as their authors publish them: names, shapes, way round."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

L, H, G, D, M, T = 4, 2, 2, 8, 32, 60
"""Layers, KV heads, query heads of each, head size and hidden size of the tiny Llama; tokens."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def published_q_filters(path: Path, binary: bool = False) -> Tensor:
    filters = drawn(L, H, D, seed=1)
    if binary:
        torch.save({"q_filters": filters}, path / "pytorch_model.bin")
    else:
        save_file({"q_filters": filters}, path / "model.safetensors")
        (path / "config.json").write_text("{}")
    return filters


def published_stats(path: Path) -> tuple[Tensor, Tensor]:
    half = drawn(L, H * G, D, D, seed=2)
    mean, covariance = drawn(L, H * G, D), half @ half.mT / D
    stats = {"query_mean": mean.bfloat16(), "query_cov": covariance.bfloat16()}
    save_file(stats, path / "model.safetensors", {"format": "pt"})
    return stats["query_mean"].double(), stats["query_cov"].double()


def gates_as_published(layers: int = L, d: int = 4, n_base: int = 3, m: int = M):
    """A state of each layer's gate: halves, but for the norms and the base."""
    gates = []
    for layer in range(layers):
        gates.append(
            {
                "k_base": drawn(H, 1, n_base, d, seed=layer),
                "b": drawn(H, 1, G, seed=layer + 10).bfloat16(),
                "q_proj.weight": drawn(H * G * d, m, seed=layer + 20).bfloat16() / 4,
                "q_proj.bias": drawn(H * G * d, seed=layer + 30).bfloat16(),
                "k_proj.weight": drawn(H * d, m, seed=layer + 40).bfloat16() / 4,
                "q_norm.weight": 1 + drawn(d, seed=layer + 50) / 4,
                "k_norm.weight": 1 + drawn(d, seed=layer + 60) / 4,
            }
        )
    return gates


def save_gates(path: Path, gates) -> None:
    """Write gates as their trainer does, with the curves of its losses beside them."""
    curve = np.random.default_rng(0).normal(size=(5, len(gates)))
    beside = {"loss": curve, "acc": curve, "loss_train": curve, "acc_train": curve.mean()}
    torch.save({"module": gates, **beside}, path)


def published_kvzap(path: Path, model_type: str, layers: int = L) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for i in range(layers):
        parts = {"": (H, M)} if model_type == "linear" else {".0": (5, M), ".2": (H, 5)}
        for j, (name, shape) in enumerate(parts.items()):
            found[f"layers.{i}{name}.weight"] = drawn(*shape, seed=9 * i + j).bfloat16()
            found[f"layers.{i}{name}.bias"] = drawn(shape[0], seed=9 * i + j + 4).bfloat16()
    save_file(found, path / "model.safetensors", {"format": "pt"})
    return found


def published_curve(path: Path, layers: int = L) -> np.ndarray:
    """What each head evicts at ratios 0.01 to 0.99, the ratio on average."""
    drop = np.arange(1, 100)[:, None, None] / 100 * np.ones((99, layers, H))
    lean = np.minimum(drop, 1 - drop) * 0.8
    sign = np.where(np.arange(layers * H).reshape(layers, H) % 2, 1, -1)
    np.save(path / "ea_avg_ratio.npy", drop + lean * sign)
    return drop + lean * sign


def good(kind: str, folder: Path, layers: int = L) -> Path:
    """A published file of a kind, for models of so many layers."""
    if kind == "q_filters":
        save_file({"q_filters": drawn(layers, H, D)}, folder / "model.safetensors")
    elif kind == "query_stats":
        stats = {"query_mean": drawn(layers, H * G, D), "query_cov": drawn(layers, H * G, D, D)}
        save_file(stats, folder / "model.safetensors")
    elif kind == "fastkvzip":
        save_gates(folder / "model.pt", gates_as_published(layers))
    elif kind == "lukv":
        published_curve(folder, layers)
    else:
        published_kvzap(folder, kind.removeprefix("kvzap_"), layers)
    return next(path for path in folder.iterdir() if path.suffix != ".json")
