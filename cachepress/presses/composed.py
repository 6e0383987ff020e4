"""Composed: one press after the other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import NoReturn

import torch
from torch import Tensor

from cachepress.budgets import Amount, TopK
from cachepress.errors import CachepressError
from cachepress.presses.base import BasePress
from cachepress.schedules import AfterPrefill
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class _Chain:
    """Amounts one after the other: each counts what the one before it left."""

    amounts: tuple[Amount, ...]

    def rows(self, view: LayerView) -> Tensor:
        """Rows for each head, ``[B]``."""
        for amount in self.amounts:
            view = replace(view, n_seen=amount.rows(view).clamp(min=1))
        return view.n_seen


@dataclass(frozen=True)
class ComposedPress(BasePress, alias="composed"):
    """Lets several presses choose, each among the rows that the one before it left.

    Two presses at 0.5 remove three quarters. Needs what all of them need.

    Attributes:
        presses: the presses, the first one first.
    """

    presses: Sequence[BasePress]

    def __post_init__(self) -> None:
        presses = self.presses
        if not isinstance(presses, Sequence) or not presses:
            raise CachepressError(f"presses: got {presses!r}, wanted a list of presses")
        for press in presses:
            if not isinstance(press, BasePress):
                raise CachepressError(f"presses: got {press!r} in the list, wanted presses only")
            if press.budget.scope == "model" or press.schedule != AfterPrefill():
                raise CachepressError(
                    f"ComposedPress chooses layer by layer after a prompt, which {press!r} does "
                    "not: wrap the ComposedPress instead"
                )
        object.__setattr__(self, "presses", tuple(presses))
        if any(press.compacts for press in presses[:-1]):
            raise CachepressError("only the last of the presses can rotate keys: put it last")
        reduce(or_, (press.needs for press in presses))  # Raises where they cannot be combined.

    @property
    def needs(self) -> Needs:
        """What all presses need."""
        return reduce(or_, (press.needs for press in self.presses))

    @property
    def budget(self) -> TopK:
        """The last press's budget, of what the others leave."""
        return replace(self.presses[-1].budget, amount=self._amount(len(self.presses)))

    @property
    def compacts(self) -> bool:
        """Whether the last press compacts."""
        return self.presses[-1].compacts

    @property
    def compression_ratio(self) -> float | None:
        """The ratio of all presses together; None where one has another budget."""
        kept = 1.0
        for press in self.presses:
            ratio = getattr(press, "compression_ratio", None)
            if ratio is None:
                return None
            kept *= 1 - ratio
        return round(1 - kept, 6)

    def score(self, view: LayerView) -> Tensor:
        """The last press's score of the rows that all others keep, ``[B, H, T]``."""
        lowest = torch.finfo(torch.float32).min
        everyone = view.valid
        for i, press in enumerate(self.presses[:-1], start=1):
            stage = replace(view, n_kept=self._amount(i).rows(view).clamp(min=1))
            view = view.only(press.budget.select(press.score(stage), stage.valid, stage.n_kept))
        scores = self.presses[-1].score(view).float()
        return torch.where(view.valid | ~everyone, scores, lowest)

    def check_layers(self, n_layers: int) -> None:
        """Raise if one of the presses does not fit the model."""
        for press in self.presses:
            press.check_layers(n_layers)

    def with_ratio(self, ratio: float) -> NoReturn:
        """Refused: there is more than one ratio."""
        raise CachepressError("ComposedPress has a ratio in each of its presses: give those")

    def _amount(self, stages: int) -> _Chain:
        return _Chain(tuple(press.budget.amount for press in self.presses[:stages]))
