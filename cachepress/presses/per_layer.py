"""Per-layer compression: every layer has a ratio of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NoReturn

from cachepress.budgets import PerLayer, TopK, check_ratio
from cachepress.errors import CachepressError
from cachepress.press import WrapperPress
from cachepress.presses._checks import counted


@dataclass(frozen=True)
class PerLayerCompressionPress(WrapperPress, alias="per_layer"):
    """Gives every layer a compression ratio of its own.

    Needs what the inner press needs. Best for models whose layers were measured one by one.

    Attributes:
        press: the press that scores; its own ratio does not count.
        compression_ratios: a ratio for each layer that is compressed, the first layer first.
    """

    compression_ratios: Sequence[float] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        counted(self)
        if not isinstance(self.compression_ratios, Sequence) or not self.compression_ratios:
            raise CachepressError(
                f"compression_ratios: got {self.compression_ratios!r}, wanted a list of ratios, "
                "one for each layer"
            )
        object.__setattr__(self, "compression_ratios", tuple(self.compression_ratios))
        for ratio in self.compression_ratios:
            check_ratio(ratio, "compression_ratios")

    @property
    def compression_ratio(self) -> float:
        """The mean ratio."""
        return fmean(self.compression_ratios)

    @property
    def budget(self) -> TopK:
        """The inner budget, with each layer's own amount."""
        return replace(counted(self), amount=PerLayer(tuple(self.compression_ratios)))

    def check_layers(self, n_layers: int) -> None:
        """Raise unless there is one ratio for each compressed layer."""
        super().check_layers(n_layers)
        if len(self.compression_ratios) != n_layers:
            raise CachepressError(
                f"compression_ratios: got {len(self.compression_ratios)} ratios, wanted "
                f"{n_layers}, one for each layer that is compressed"
            )

    def with_ratio(self, ratio: float) -> NoReturn:
        """Raise: there is more than one ratio."""
        raise CachepressError(
            "PerLayerCompressionPress has a ratio for each layer: give compression_ratios"
        )
