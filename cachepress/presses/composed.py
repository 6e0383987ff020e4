"""Composition of presses, one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import NoReturn

import torch
from torch import Tensor

from cachepress.budgets import CHOSEN, Amount, Threshold, TopK
from cachepress.errors import CachepressError
from cachepress.given import press_of
from cachepress.hf.types import PreTrainedModel
from cachepress.limits import shown
from cachepress.ops import wide
from cachepress.press import BasePress
from cachepress.ranks import choose
from cachepress.reconstruction import ReconstructionView
from cachepress.schedules import AfterPrefill
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class _Chain:
    """Amounts one after the other: each counts what the one before it keeps."""

    amounts: tuple[Amount, ...]

    def pairs(self, view: LayerView) -> Tensor:
        """Pairs of each head, ``[B]``."""
        for amount in self.amounts:
            view = replace(view, n_seen=amount.pairs(view).clamp(min=1))
        return view.n_seen


@dataclass(frozen=True)
class ComposedPress(BasePress, alias="composed"):
    """Applies several presses one after the other, each to the tokens that the last one kept.

    Two presses at 0.5 remove three quarters. After a press with a threshold, the others count the
    tokens that it keeps, at a later prompt too. Needs what all of them need. Best for combining
    different evictions, or eviction with key channels.

    Attributes:
        presses: the presses, the first one first.
    """

    presses: Sequence[BasePress]

    def __post_init__(self) -> None:
        given = self.presses
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise CachepressError(
                f"presses: got {shown(given)}, wanted a list of presses, such as "
                "ComposedPress([SnapKVPress(0.5), ThinKPress(0.5)])"
            )
        found = tuple(press_of(press, "presses") for press in given)
        presses = tuple(press for press in found if press is not None)
        if len(presses) < len(found):
            raise CachepressError("presses: got no press in the list, wanted presses only")
        for press in presses:
            if press.budget.scope == "model" or press.schedule != AfterPrefill():
                raise CachepressError(
                    f"ComposedPress chooses layer by layer after a prompt, which {press!r} does "
                    "not: wrap the ComposedPress instead"
                )
        object.__setattr__(self, "presses", presses)
        if any(press.needs.compaction for press in presses[:-1]):
            raise CachepressError("only the last of the presses can rotate keys: put it last")
        if sum(press.needs.token_state for press in presses) > 1:
            raise CachepressError(
                "a token keeps one number until the next compression, and more than one of the "
                "presses keeps one: compose one of them with presses that do not"
            )
        if sum(press.needs.pair_bias for press in presses) > 1:
            raise CachepressError(
                "a pair has one bias, and more than one of the presses gives it one: keep one"
            )
        if sum(press.needs.storage is not None for press in presses) > 1:
            raise CachepressError(
                "more than one of the presses says how pairs are stored: keep one"
            )
        reduce(or_, (press.needs for press in presses))  # Raises where they cannot be combined.

    @property
    def needs(self) -> Needs:
        """What all presses need."""
        return reduce(or_, (press.needs for press in self.presses))

    @property
    def budget(self) -> TopK | Threshold:
        """The last press's budget, of what the others keep."""
        last = self.presses[-1].budget
        if isinstance(last, TopK) and self._counted:
            return replace(last, amount=self._amount(len(self.presses)))
        return CHOSEN

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

    def reconstructed(self, view: ReconstructionView) -> Tensor:
        """What the press that reconstructs the context computes of a chunk that was repeated."""
        return next(
            press.reconstructed(view) for press in self.presses if press.needs.reconstruction
        )

    def score(self, view: LayerView) -> Tensor:
        """Score the pairs that all others keep by the last press, ``[B, H, T]``."""
        everything = view.valid
        for i, press in enumerate(self.presses[:-1], start=1):
            view = view.only(self._stage(press, view, i))
        scores = wide(self.presses[-1].score(view))
        if self.budget == CHOSEN:
            return choose(scores, self._stage(self.presses[-1], view, len(self.presses)))
        lowest = torch.finfo(torch.float32).min
        return torch.where(view.valid | ~everything, scores, lowest)

    def token_state(self, view: LayerView) -> Tensor | None:
        """The state of the press that keeps one with each token."""
        return next(
            (press.token_state(view) for press in self.presses if press.needs.token_state), None
        )

    def pair_bias(self, view: LayerView, mask: Tensor) -> Tensor | None:
        """The bias of the press that gives pairs one, or the one that they have."""
        giving = (press.pair_bias(view, mask) for press in self.presses if press.needs.pair_bias)
        return next(giving, view.pair_bias)

    def merge(self, view: LayerView, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """Merge evicted pairs as the first press does that merges any."""
        merged = (press.merge(view, mask) for press in self.presses)
        return next((pairs for pairs in merged if pairs is not None), None)

    def key_channels(self, view: LayerView, mask: Tensor) -> Tensor | None:
        """The key channels of the first press that chooses some."""
        found = (press.key_channels(view, mask) for press in self.presses)
        return next((channels for channels in found if channels is not None), None)

    def check_layers(self, n_layers: int) -> None:
        """Raise if one of the presses does not fit the model."""
        for press in self.presses:
            press.check_layers(n_layers)

    def for_model(self, model: PreTrainedModel) -> "ComposedPress":
        """Make all presses ready for a model."""
        return replace(self, presses=[press.for_model(model) for press in self.presses])

    def with_ratio(self, ratio: float) -> NoReturn:
        """Raise: there is more than one ratio."""
        raise CachepressError("ComposedPress has a ratio in each of its presses: give those")

    @property
    def _counted(self) -> bool:
        return all(isinstance(press.budget, TopK) for press in self.presses)

    def _stage(self, press: BasePress, view: LayerView, stages: int) -> Tensor:
        """Select what a press keeps of what the ones before it kept, ``[B, H, T]``."""
        if self._counted:
            n_kept = self._amount(stages).pairs(view).clamp(min=1)
        else:
            # A threshold came first: each head has a number of its own, of which the budget counts.
            held = replace(view, n_seen=view.valid.sum(-1))  # [B, H]
            n_kept = press.budget.count(held)
        average = n_kept if n_kept.ndim == 1 else n_kept.double().mean(-1)
        scores = press.score(replace(view, n_kept=average))
        return press.budget.select(scores, view.valid, n_kept)

    def _amount(self, stages: int) -> _Chain:
        budgets = [press.budget for press in self.presses[:stages]]
        return _Chain(tuple(budget.amount for budget in budgets if isinstance(budget, TopK)))
