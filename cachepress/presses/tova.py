"""TOVA: tokens that the last one attends to."""

from dataclasses import dataclass

from torch import Tensor

from cachepress.press import ScorerPress
from cachepress.ranks import pin_window
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class TOVAPress(ScorerPress, alias="tova"):
    """Keeps the tokens that the last query attends to most, the same ones in every head.

    Oren et al., "Transformers are Multi-State RNNs" (arXiv:2401.06104). Needs the last query. Best
    for decoding, token by token.
    """

    @property
    def needs(self) -> Needs:
        """The last query."""
        return Needs(queries=1)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by the last query's attention, averaged over all heads, ``[B, H, T]``."""
        mean = view.window_attention(1).mean((1, 2))  # [B, T]
        return pin_window(mean[:, None].expand_as(view.index), view, 1)
