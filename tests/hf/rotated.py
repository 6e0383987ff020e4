"""Models whose frequencies change with a text's length, and a press that undoes rotations."""

from dataclasses import dataclass, field
from functools import partial

import torch
import transformers as hf
from torch import Tensor, nn

import cachepress as cp
from cachepress.view import LayerView, Needs
from tests.exact import doubled
from tests.tiny import SMALL

SWITCH = 64
LONG = {
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": SWITCH,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": SWITCH,
    },
    "default": {"rope_type": "default"},
}
SOURCES = ("k_norm", "k_proj", "qkv_proj")
"""Submodules of attention that compute keys, that which comes last in front."""
LENGTHENS = ("longrope", "dynamic")
"""Those whose frequencies change with the length of a text."""


def long_model(kind: str) -> hf.PreTrainedModel:
    """A tiny model in float64 whose frequencies change beyond 64 tokens, if they do."""
    torch.manual_seed(0)
    small = {**SMALL, "rope_parameters": {"rope_theta": 1e4, **LONG[kind]}, "num_hidden_layers": 2}
    if kind == "longrope":
        more = {"original_max_position_embeddings": SWITCH, "sliding_window": None}
        return doubled(hf.Phi3ForCausalLM(hf.Phi3Config(**small, **more)).eval())
    small["max_position_embeddings"] = SWITCH if kind == "dynamic" else 512
    return doubled(hf.LlamaForCausalLM(hf.LlamaConfig(**small)).eval())


@dataclass(frozen=True, repr=False)
class UndoPress(cp.ScorerPress):
    """Keeps the longest keys, and all keys as they were before they were rotated, by layer."""

    undone: dict[int, Tensor] = field(default_factory=dict, compare=False)

    @property
    def needs(self) -> Needs:
        """The rotary embedding."""
        return Needs(rotary=True)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by the norm of the key."""
        assert view.rotary is not None
        positions = view.rope.flatten(0, 1)
        undone = view.rotary(view.keys.flatten(0, 1), positions, inverse=True)
        self.undone[view.layer] = undone.view_as(view.keys)
        return view.keys.norm(dim=-1)


def bare_keys(model: nn.Module) -> dict[int, list[Tensor]]:
    """What each layer computes from now on as keys before they are rotated, ``[B, n, H * D]``."""
    found: dict[int, list[Tensor]] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        source = next((x for x in map(partial(_part, module), SOURCES) if x is not None), None)
        if layer is None or source is None:
            continue

        def keep(_, __, out, layer=layer, module=module):
            if out.shape[-1] == 64:  # Queries, keys and values in one: 4 heads, and twice 2.
                out = out[..., 32:48]
            if out.ndim == 4:
                out = (out.transpose(1, 2) if out.shape[1] == 2 else out).flatten(2)
            found.setdefault(layer, []).append(out)

        source.register_forward_hook(keep)
    return found


def _part(module: nn.Module, name: str) -> nn.Module | None:
    part = getattr(module, name, None)
    return part if isinstance(part, nn.Module) else None


def error(press: UndoPress, bare: dict[int, list[Tensor]]) -> float:
    """By how much keys that were undone differ from the bare ones, by their size, at most."""
    assert press.undone
    worst = 0.0
    for layer, undone in press.undone.items():
        given = torch.cat(bare[layer], 1)[:, -undone.shape[2] :]  # Without those of a trial before.
        wanted = given.unflatten(-1, (undone.shape[1], -1)).transpose(1, 2)
        worst = max(worst, float((undone - wanted).abs().max() / wanted.abs().max()))
    return worst
