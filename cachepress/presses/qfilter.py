"""Q-Filters: projection of keys on the main direction of the queries."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from cachepress.artefacts.kept import find_artefact
from cachepress.artefacts.reading import check_shapes, fitted_layers, load_artefact, sizes
from cachepress.hf.types import PreTrainedModel
from cachepress.ops import by_token, wide, wide_dtype
from cachepress.press import ScorerPress
from cachepress.view import LayerView

KIND = "q_filters"


@dataclass(frozen=True)
class QFilterPress(ScorerPress, alias="qfilter"):
    """Keeps the tokens whose keys project farthest on the main direction of the queries.

    Godey et al., "Q-Filters: Leveraging QK Geometry for Efficient Key-Value Cache Compression"
    (arXiv:2503.02812). The direction of each query head is the first right singular vector of its
    queries as attention uses them, with the sign that they project to positively; a KV head gets
    the mean of its group. It is learned from a text beforehand: ``cachepress train q_filters``.
    Needs nothing but keys. Best for decoding and fused attention, as no attention is observed.

    Attributes:
        filters: the file, its folder or a hub repository with it, as ``cachepress train`` or the
            authors wrote it; None for the one trained on this machine.
        layers: which layers of the file are the model's full-attention layers; None to find out.
    """

    filters: str | None = field(default=None, kw_only=True)
    layers: tuple[int, ...] | None = field(default=None, kw_only=True)

    @property
    def learned(self) -> Mapping[str, str]:
        """The option that names the trained file, and the kind of file."""
        return {"filters": KIND}

    def for_model(self, model: PreTrainedModel) -> "QFilterPress":
        """Find the trained file for a model, and check that it fits."""
        path = find_artefact(KIND, self.filters, model)
        layers, (n, h, _, d, _) = fitted_layers(path, KIND, model), sizes(model)
        check_shapes(load_artefact(path, KIND, layers=layers), {"filters": (n, h, d)}, path)
        return replace(self, filters=path, layers=layers)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by the product of key and filter of their head, ``[B, H, T]``."""
        if self.filters is None:
            raise TypeError("the press was not made ready for a model")
        learned = load_artefact(self.filters, KIND, view.keys.device, self.layers)
        own = learned["filters"][view.depth].to(wide_dtype(view.keys)).unsqueeze(-1)  # [H, D, 1]
        return by_token(lambda keys: (wide(keys) @ own).squeeze(-1), view.keys)
