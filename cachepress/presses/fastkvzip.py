"""Fast KVzip: KVzip's scores, predicted by a gate in each layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.artefacts.kept import find_artefact
from cachepress.artefacts.reading import check_shapes, fitted_layers, load_artefact, sizes
from cachepress.budgets import TopK, check_fraction
from cachepress.checks import check_count
from cachepress.hf.types import PreTrainedModel
from cachepress.ops import wide
from cachepress.presses._surrogate import _SurrogatePress
from cachepress.ranks import pin_sinks, pin_window
from cachepress.view import LayerView

KIND = "fastkvzip"
_SHORT = 32000


@dataclass(frozen=True)
class FastKVzipPress(_SurrogatePress, alias="fastkvzip"):
    """Keeps the tokens to which a trained gate in each layer predicts KVzip's highest scores.

    Kim et al., "Fast KVzip: Efficient and Accurate LLM Inference with Gated KV Eviction"
    (arXiv:2601.17668). A gate makes a short query for each query head and a short key for each KV
    head of a token's hidden state, and compares their product with those of the query and a few
    learned keys: an attention of its own, of one token. It is learned from a text beforehand:
    ``cachepress train fastkvzip``. Heads and layers compete. Needs hidden states. Best for KVzip's
    choice at the cost of a forward.

    Attributes:
        layerwise: whether every layer gets the same share, so that only its heads compete.
        n_sink: first tokens, which always stay.
        window_size: newest tokens that always stay in a text of 32,000 tokens or more.
        window_ratio: fraction of a shorter text that these are, at least one token.
        gates: the file, its folder or a hub repository with it, as ``cachepress train`` or the
            authors wrote it; None for the one trained on this machine.
        layers: which layers of the file are the model's full-attention layers; None to find out.
    """

    layerwise: bool = False
    n_sink: int = 4
    window_size: int = 4096
    window_ratio: float = 0.02
    gates: str | None = field(default=None, kw_only=True)
    layers: tuple[int, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "n_sink", least=0)
        check_count(self, "window_size")
        check_fraction(self.window_ratio, "window_ratio")

    @property
    def budget(self) -> TopK:
        """The pairs with the highest scores in the model, or in each layer."""
        return replace(super().budget, scope="layer" if self.layerwise else "model")

    @property
    def learned(self) -> Mapping[str, str]:
        """The option that names the trained file, and the kind of file."""
        return {"gates": KIND}

    def for_model(self, model: PreTrainedModel) -> "FastKVzipPress":
        """Find the trained file for a model, and check that it fits."""
        path = find_artefact(KIND, self.gates, model)
        layers, (n, h, g, _, m) = fitted_layers(path, KIND, model), sizes(model)
        learned = load_artefact(path, KIND, layers=layers)
        d = max(1, learned["q_norm"].numel() // n)
        s = max(1, learned["base"].numel() // (n * h * d))
        wanted = {"q_norm": (n, d), "k_norm": (n, d), "bias": (n, h, g)}
        wanted |= {"q_weight": (n, h * g * d, m), "q_bias": (n, h * g * d)}
        wanted |= {"k_weight": (n, h * d, m), "base": (n, h, s, d)}
        check_shapes(learned, wanted, path)
        return replace(self, gates=path, layers=layers)

    def predict(self, hidden: Tensor, depth: int) -> Tensor:
        """Predict the score of each pair, from 0 to 1, ``[B, H, n]``."""
        if self.gates is None:
            raise TypeError("the press was not made ready for a model")
        learned = load_artefact(self.gates, KIND, hidden.device, self.layers)
        x = wide(hidden)
        return gate(x, {name: part[depth].to(x.dtype) for name, part in learned.items()})

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by prediction, sinks and newest tokens above all others, ``[B, H, T]``."""
        short = (view.n_seen * self.window_ratio).long().clamp(min=1)
        window = torch.where(view.n_seen < _SHORT, short, self.window_size)
        return pin_sinks(pin_window(super().score(view), view, window), view, self.n_sink)


def gate(hidden: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
    """Apply one layer's gate to hidden states ``[B, n, M]``: ``[B, H, n]``, from 0 to 1.

    Args:
        hidden: the hidden states.
        learned: ``q_weight [H * G * d, M]``, ``q_bias [H * G * d]``, ``k_weight [H * d, M]``,
            ``q_norm [d]``, ``k_norm [d]``, ``base [H, s, d]`` and ``bias [H, G]``.
    """
    h, g = learned["bias"].shape
    d = learned["q_norm"].shape[-1]
    queries = F.linear(hidden, learned["q_weight"], learned["q_bias"])
    queries = queries.unflatten(-1, (h, g, d))
    keys = F.linear(hidden, learned["k_weight"]).unflatten(-1, (h, 1, d))
    queries = F.rms_norm(queries, (d,), learned["q_norm"], 1e-6)
    keys = F.rms_norm(keys, (d,), learned["k_norm"], 1e-6)
    own = (queries * keys).sum(-1) / d**0.5 + learned["bias"]  # [B, n, H, G]
    others = torch.einsum("bnhgd,hsd->bnhgs", queries, learned["base"]) / d**0.5
    score = 1 / (1 + (others - own.unsqueeze(-1)).exp().sum(-1))
    return score.mean(-1).mT
