"""Schedules: in which forwards a layer is compressed."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Step(NamedTuple):
    """A forward, as a schedule sees it.

    Attributes:
        seen: tokens before it.
        new: tokens of it.
        since: tokens since a press last looked at the layer, those of this forward included, and
            those of prompts that were left as they are not, unless the schedule is ``bounded``.
        prompt: whether it reads a text, rather than decoding a token.
        later: whether that is a text after the first one, which is to be left as it is.
    """

    seen: int
    new: int
    since: int
    prompt: bool
    later: bool = False


class Schedule(Protocol):
    """When a layer is settled."""

    @property
    def decodes(self) -> bool:
        """Whether layers are settled while tokens are decoded."""
        ...

    @property
    def bounded(self) -> bool:
        """Whether every token counts, since the bytes of the cache are limited while it grows."""
        ...

    def due(self, step: Step) -> bool:
        """Whether a forward settles the layer."""
        ...


@dataclass(frozen=True)
class AfterPrefill:
    """Settle after the prompt and after every further turn of several tokens; never in decode."""

    decodes: bool = False
    bounded: bool = False

    def due(self, step: Step) -> bool:
        """Whether a forward settles the layer."""
        return step.prompt and not step.later


@dataclass(frozen=True)
class Every:
    """Settle after the prompt, and in decode whenever ``interval`` tokens came since.

    Attributes:
        interval: tokens between two settles.
        bounded: whether no more may come in between, those of prompts that are left as they are
            included.
    """

    interval: int
    bounded: bool = False
    decodes: bool = True

    def due(self, step: Step) -> bool:
        """Whether a forward settles the layer."""
        if step.later:
            return self.bounded and step.since >= self.interval
        return step.prompt or step.since >= self.interval
