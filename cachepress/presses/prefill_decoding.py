"""Compression of prompts by one press, and during decoding by another."""

from dataclasses import dataclass, replace

from cachepress.budgets import Budget, Bytes, TopK, bytes_of
from cachepress.errors import CachepressError
from cachepress.given import press_of
from cachepress.hf.types import PreTrainedModel
from cachepress.press import BasePress, WrapperPress
from cachepress.schedules import Schedule, Step
from cachepress.view import Needs


@dataclass(frozen=True)
class PrefillDecodingPress(BasePress, alias="prefill_decoding"):
    """Compresses prompts with one press, and while decoding with another.

    Needs what both need. Best for long prompts with long answers.

    Attributes:
        prefilling_press: compresses prompts; None keeps them whole.
        decoding_press: a ``DecodingPress`` or ``CompressionRatioDecodingPress`` that compresses
            what is decoded, the prompt's tokens included; None for none. Its ``max_bytes`` holds
            for prompts, too: they are compressed so far that the first tokens fit.
    """

    prefilling_press: BasePress | None = None
    decoding_press: BasePress | None = None

    def __post_init__(self) -> None:
        for name in ("prefilling_press", "decoding_press"):
            object.__setattr__(self, name, press_of(getattr(self, name), name))
        first, second = self.prefilling_press, self.decoding_press
        if first is None and second is None:
            raise CachepressError("got neither prefilling_press nor decoding_press: give one")
        if first is not None and first.schedule.decodes:
            raise CachepressError(f"prefilling_press: got {first!r}, wanted a press for prompts")
        if second is not None and not second.schedule.decodes:
            raise CachepressError(
                f"decoding_press: got {second!r}, wanted for example "
                "DecodingPress(KnormPress(), target_size=1024)"
            )
        stored = {
            p.needs.storage for p in (self._first, self._second) if p.needs.storage is not None
        }
        if len(stored) > 1:
            raise CachepressError("the two presses store pairs in different ways: give one of them")
        _ = self.needs  # Raises where they cannot be combined.

    @property
    def needs(self) -> Needs:
        """What both presses need."""
        return self._first.needs | self._second.needs

    @property
    def budget(self) -> Budget:
        """The budget for prompts, or the one for decoding if there is no other."""
        return self._first.budget

    @property
    def schedule(self) -> Schedule:
        """The schedules of both."""
        first = self.prefilling_press if self._limit is None else self._first
        return _Both(first, self.decoding_press)

    @property
    def compression_ratio(self) -> float | None:
        """The ratio for prompts."""
        return getattr(self.prefilling_press, "compression_ratio", None)

    def acting(self, step: Step) -> BasePress:
        """The press for prompts, or the one for decoding."""
        return self._first if step.prompt and not step.later else self._second

    def check_layers(self, n_layers: int) -> None:
        """Raise if one of the presses does not fit the model."""
        self._first.check_layers(n_layers)
        self._second.check_layers(n_layers)

    def for_model(self, model: PreTrainedModel) -> "PrefillDecodingPress":
        """Make both presses ready for a model."""
        first, second = self.prefilling_press, self.decoding_press
        return PrefillDecodingPress(
            None if first is None else first.for_model(model),
            None if second is None else second.for_model(model),
        )

    def with_ratio(self, ratio: float) -> "PrefillDecodingPress":
        """Return both presses, the one for prompts at another ratio."""
        if self.prefilling_press is None:
            raise CachepressError("there is no prefilling_press to set a ratio of")
        return replace(self, prefilling_press=self.prefilling_press.with_ratio(ratio))

    @property
    def _first(self) -> BasePress:
        press = self.prefilling_press or self.decoding_press
        assert press is not None
        limit = self._limit
        if limit is None:
            return press
        amount = None if self.prefilling_press is None else _counted(press).amount
        return _Limited(press, replace(limit, most=amount))

    @property
    def _limit(self) -> Bytes | None:
        """The bytes that the press for decoding allows."""
        budget = None if self.decoding_press is None else self.decoding_press.budget
        return bytes_of(budget.amount) if isinstance(budget, TopK) else None

    @property
    def _second(self) -> BasePress:
        press = self.decoding_press or self.prefilling_press
        assert press is not None
        return press


@dataclass(frozen=True)
class _Limited(WrapperPress):
    """The press for prompts, where the bytes that ``decoding_press`` allows limit it, too.

    Attributes:
        amount: the bytes, and what the press keeps of what fits.
    """

    amount: Bytes

    @property
    def budget(self) -> TopK:
        """The inner press's budget, for no more pairs than fit."""
        return replace(_counted(self.press), amount=self.amount)


def _counted(press: BasePress) -> TopK:
    """Return the budget of a press that has to fit into a number of bytes.

    Raises:
        CachepressError: if the press has no budget of a number of pairs.
    """
    if not isinstance(press.budget, TopK):
        raise CachepressError(
            f"prefilling_press: got {press!r}, which keeps as many pairs as its own rule says, "
            "beside max_bytes in decoding_press: give one with a budget, such as SnapKVPress(0.5)"
        )
    return press.budget


@dataclass(frozen=True)
class _Both:
    """The schedule of a press for prompts and one for decoding."""

    first: BasePress | None
    second: BasePress | None

    @property
    def decodes(self) -> bool:
        """Whether there is a press for decoding."""
        return self.second is not None

    @property
    def bounded(self) -> bool:
        """Whether the press for decoding counts every token."""
        return self.second is not None and self.second.schedule.bounded

    def due(self, step: Step) -> bool:
        """Whether the press that acts is due."""
        press = self.first if step.prompt and not step.later else self.second
        return press is not None and press.schedule.due(step)
