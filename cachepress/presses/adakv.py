"""AdaKV: heads compete for the budget of their layer."""

from dataclasses import dataclass, replace

from cachepress.budgets import SCOPES, TopK, check_fraction
from cachepress.errors import CachepressError
from cachepress.press import WrapperPress
from cachepress.presses._checks import counted


@dataclass(frozen=True)
class AdaKVPress(WrapperPress, alias="adakv"):
    """Lets all heads of a layer compete for one budget, so that heads with high scores keep more.

    Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient
    LLM Inference" (arXiv:2407.11550). Every head physically holds its own number of pairs. Needs
    what the inner press needs; the scores of different heads must be comparable. Best for scores
    that are shares of attention.

    Attributes:
        press: the press that scores.
        alpha_safeguard: fraction of an equal share that every head keeps whatever its scores.
        scope: "layer", or "model" to let the heads of all layers compete; then no pair is evicted
            before the whole forward is done.
    """

    alpha_safeguard: float = 0.20
    scope: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        counted(self)
        check_fraction(self.alpha_safeguard, "alpha_safeguard")
        if self.scope not in SCOPES[1:]:
            raise CachepressError(f'scope: got {self.scope!r}, wanted "layer" or "model"')

    @property
    def budget(self) -> TopK:
        """The inner budget, for the heads of a layer or of the model together."""
        return replace(counted(self), scope=self.scope, floor=self.alpha_safeguard)
