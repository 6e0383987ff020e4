"""A press that drops nothing and looks: for what is found or learned of a model."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from cachepress.budgets import Ratio, TopK
from cachepress.press import BasePress
from cachepress.view import LayerView, Needs


@dataclass(frozen=True, repr=False)
class _LookingPress(BasePress):
    """Keeps every row, and shows each layer to a function.

    Attributes:
        wants: what the function wants to see.
        look: the function.
    """

    wants: Needs
    look: Callable[[LayerView], None]

    @property
    def needs(self) -> Needs:
        """What the function wants to see, in every layer although no pair is evicted."""
        return replace(self.wants, rewrites=True)

    @property
    def budget(self) -> TopK:
        """All rows."""
        return TopK(Ratio(0.0))

    def score(self, view: LayerView) -> Tensor:
        """The age of each row, ``[B, H, T]``."""
        self.look(view)
        return view.index.float()
