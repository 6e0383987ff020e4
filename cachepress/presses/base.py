"""What a press is: a frozen set of answers to the engine's questions."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor
from transformers import PreTrainedModel

from cachepress.budgets import TopK, check_ratio
from cachepress.core import Budget, LayerView, Needs, Press, Schedule
from cachepress.errors import CachepressError
from cachepress.hf import Observation
from cachepress.schedules import AfterPrefill


class BasePress:
    """A method of compression, as frozen data.

    Subclasses are frozen dataclasses: ``repr(press)`` is the press's spelling and
    ``cachepress.parse`` reads it back.
    """

    @property
    def needs(self) -> Needs:
        """What the scorer wants to see beyond keys, values and positions."""
        return Needs()

    @property
    def budget(self) -> Budget:
        """How many rows stay, and who competes for them."""
        raise NotImplementedError(f"{type(self).__name__} has no budget")

    @property
    def schedule(self) -> Schedule:
        """When a layer is settled."""
        return AfterPrefill()

    def score(self, view: LayerView) -> Tensor:
        """Worth of each row, ``[B, H, T]``; the highest are kept."""
        raise NotImplementedError(f"{type(self).__name__} has no score")

    def with_ratio(self, ratio: float) -> Self:
        """The same press at another compression ratio."""
        raise NotImplementedError(f"{type(self).__name__} has no compression ratio")

    def __call__(
        self, model: PreTrainedModel, *, turns: str = "all"
    ) -> AbstractContextManager[None]:
        """Compress what the model caches inside the ``with`` block.

        Args:
            model: a transformers decoder model.
            turns: "all" settles after every forward of several tokens, "first" after the first.

        Raises:
            UnsupportedError: if the model's cache cannot be compressed.
        """
        return Observation(self, model, turns)


@dataclass(frozen=True)
class ScorerPress(BasePress):
    """A press that is a score, with the same budget for every head.

    Attributes:
        compression_ratio: fraction of pairs removed, 0 <= ratio < 1.
    """

    compression_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_ratio(self.compression_ratio)

    @property
    def budget(self) -> Budget:
        """The best rows of each head."""
        return TopK(self.compression_ratio)

    def with_ratio(self, ratio: float) -> Self:
        """The same press at another compression ratio."""
        return replace(self, compression_ratio=ratio)


@dataclass(frozen=True)
class WrapperPress(BasePress):
    """A press around a press: forwards every answer; subclasses override one.

    Attributes:
        press: the inner press.
    """

    press: BasePress

    def __post_init__(self) -> None:
        if not isinstance(self.press, BasePress):
            raise CachepressError(
                f"{type(self).__name__} wraps a press: got {self.press!r}, wanted for example "
                f"{type(self).__name__}(SnapKVPress(compression_ratio=0.5))"
            )

    @property
    def needs(self) -> Needs:
        """What the inner press needs."""
        return self.press.needs

    @property
    def budget(self) -> Budget:
        """The inner press's budget."""
        return self.press.budget

    @property
    def schedule(self) -> Schedule:
        """The inner press's schedule."""
        return self.press.schedule

    def score(self, view: LayerView) -> Tensor:
        """The inner press's score, ``[B, H, T]``."""
        return self.press.score(view)

    def with_ratio(self, ratio: float) -> Self:
        """The same wrapper around the inner press at another ratio."""
        return replace(self, press=self.press.with_ratio(ratio))


def check_count(press: Press, name: str, least: int = 1) -> None:
    """Raise unless the press's field ``name`` is an integer of at least ``least``."""
    got = getattr(press, name)
    if not isinstance(got, int) or isinstance(got, bool) or got < least:
        raise CachepressError(f"{name}: got {got!r}, wanted a whole number of at least {least}")


def all_presses(base: type[BasePress] = BasePress) -> Iterator[type[BasePress]]:
    """Every press class that is defined in this process."""
    for kind in base.__subclasses__():
        yield kind
        yield from all_presses(kind)
