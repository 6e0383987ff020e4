"""PyramidKV: larger budgets for the first layers, smaller ones for the last."""

from dataclasses import dataclass

from cachepress.budgets import Amount, Pyramid
from cachepress.checks import check_count
from cachepress.presses.snapkv import SnapKVPress


@dataclass(frozen=True)
class PyramidKVPress(SnapKVPress, alias="pyramidkv"):
    """Keeps tokens as SnapKV does, with budgets that shrink from the first layer to the last.

    Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling"
    (arXiv:2406.02069). The total over the layers is exactly that of equal budgets. Needs the last
    ``window_size`` queries. Best for models whose first layers spread their attention.

    Attributes:
        beta: the last layer gets 1 / beta of the average, but at least the window.
    """

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "beta")

    @property
    def amount(self) -> Amount:
        """Pairs that each head keeps, by layer."""
        return Pyramid(super().amount, self.window_size, self.beta)
