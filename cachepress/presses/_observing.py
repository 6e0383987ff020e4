"""A press that evicts nothing and observes each layer, to measure or train on a model."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from cachepress.budgets import Ratio, TopK
from cachepress.press import BasePress
from cachepress.view import LayerView, Needs


@dataclass(frozen=True, repr=False)
class _ObservingPress(BasePress):
    """Keeps every token, and shows each layer to a function.

    Attributes:
        wants: what the function needs to observe.
        observe: the function.
    """

    wants: Needs
    observe: Callable[[LayerView], None]

    @property
    def needs(self) -> Needs:
        """What the function needs, in every layer although no pair is evicted."""
        return replace(self.wants, rewrites=True)

    @property
    def budget(self) -> TopK:
        """All pairs."""
        return TopK(Ratio(0.0))

    def score(self, view: LayerView) -> Tensor:
        """Show the layer, and score each pair by its index, ``[B, H, T]``."""
        self.observe(view)
        return view.index.float()
