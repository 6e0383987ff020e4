"""KVzap: KVzip's scores, predicted from hidden states."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from torch import Tensor

from cachepress.artefacts.kept import find_artefact
from cachepress.artefacts.reading import check_shapes, fitted_layers, load_artefact, sizes
from cachepress.errors import CachepressError
from cachepress.hf.types import PreTrainedModel
from cachepress.ops import wide
from cachepress.presses._surrogate import _SurrogatePress

TYPES = ("linear", "mlp")


@dataclass(frozen=True)
class KVzapPress(_SurrogatePress, alias="kvzap"):
    """Keeps the tokens to which a small trained model predicts KVzip+'s highest scores.

    Jegou and Jeblick, "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning" (arXiv:2601.07891).
    The surrogate of each layer maps the hidden states that attention reads to the logarithm of the
    score of each KV head, by one linear map or by two with a GELU between them. It is learned from
    a text beforehand, ``cachepress train kvzap_mlp``, or comes from a hub repository of the
    published layout (``layers.0.0.weight`` and so on). Needs hidden states. Best for thresholds at
    prefill and while decoding, as ``DMSPress(KVzapPress(), threshold=-4)``.

    Attributes:
        model_type: "mlp" or "linear".
        surrogate: the file, its folder or a hub repository; None for the one trained on this
            machine.
        layers: which layers of the file are the model's full-attention layers; None to find out.
    """

    model_type: str = "mlp"
    surrogate: str | None = field(default=None, kw_only=True)
    layers: tuple[int, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_type not in TYPES:
            raise CachepressError(f'model_type: got {self.model_type!r}, wanted "linear" or "mlp"')

    @property
    def kind(self) -> str:
        """The kind of surrogate that is trained."""
        return f"kvzap_{self.model_type}"

    @property
    def learned(self) -> Mapping[str, str]:
        """The option that names the trained file, and the kind of file."""
        return {"surrogate": self.kind}

    def for_model(self, model: PreTrainedModel) -> "KVzapPress":
        """Find the trained file for a model, and check that it fits."""
        path = find_artefact(self.kind, self.surrogate, model)
        layers, (depths, h, _, _, m) = fitted_layers(path, self.kind, model), sizes(model)
        learned = load_artefact(path, self.kind, layers=layers)
        wanted: dict[str, tuple[int, ...]] = {}
        for i in range(depths):
            if self.model_type == "linear":
                wanted |= {f"layers.{i}.weight": (h, m), f"layers.{i}.bias": (h,)}
            else:
                first, second = f"layers.{i}.0", f"layers.{i}.2"
                n = learned[f"{first}.bias"].numel() if f"{first}.bias" in learned else 1
                wanted |= {f"{first}.bias": (n,), f"{first}.weight": (n, m)}
                wanted |= {f"{second}.weight": (h, n), f"{second}.bias": (h,)}
        check_shapes(learned, wanted, path)
        return replace(self, surrogate=path, layers=layers)

    def predict(self, hidden: Tensor, depth: int) -> Tensor:
        """Predict the logarithm of the score of each pair, ``[B, H, n]``."""
        if self.surrogate is None:
            raise TypeError("the press was not made ready for a model")
        learned = load_artefact(self.surrogate, self.kind, hidden.device, self.layers)

        def linear(x: Tensor, name: str) -> Tensor:
            weight, bias = learned[f"{name}.weight"], learned[f"{name}.bias"]
            return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

        if self.model_type == "linear":
            return linear(wide(hidden), f"layers.{depth}").mT
        middle = F.gelu(linear(wide(hidden), f"layers.{depth}.0"))
        return linear(middle, f"layers.{depth}.2").mT
