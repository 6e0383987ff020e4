"""Knorm: keys with a small norm receive the most attention."""

from dataclasses import dataclass

from torch import Tensor

from cachepress.ops import norms
from cachepress.press import ScorerPress
from cachepress.view import LayerView


@dataclass(frozen=True)
class KnormPress(ScorerPress, alias="knorm"):
    """Keeps the tokens whose keys have the smallest L2 norm.

    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression"
    (arXiv:2406.11430). Needs nothing but keys. Best for a first try: it costs next to nothing.
    """

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by minus the norm of their key, ``[B, H, T]``."""
        return -norms(view.keys)
