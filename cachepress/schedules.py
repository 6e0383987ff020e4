"""Schedules: after which forwards a layer is compressed.

What is kept then is up to the budget.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Step(NamedTuple):
    """One forward, as a schedule sees it.

    Attributes:
        seen: tokens before it.
        new: tokens of it.
        since: tokens since the layer was last scored, those of this forward included. Prompts that
            were kept whole do not count, unless the schedule is ``bounded``.
        prompt: whether it reads a prompt, rather than decoding a token.
        later: whether that is a prompt after the first one, which is to be kept whole
            (``turns="first"``).
    """

    seen: int
    new: int
    since: int
    prompt: bool
    later: bool = False


class Schedule(Protocol):
    """Says after which forwards a layer is compressed."""

    @property
    def decodes(self) -> bool:
        """Whether layers are compressed while tokens are decoded."""
        ...

    @property
    def bounded(self) -> bool:
        """Whether all tokens count, since the cache may not exceed its bytes while it grows."""
        ...

    def due(self, step: Step) -> bool:
        """Tell whether the layer is compressed after a forward."""
        ...


@dataclass(frozen=True)
class AfterPrefill:
    """Compress after every prompt, that is every forward of several tokens; not while decoding."""

    decodes: bool = False
    bounded: bool = False

    def due(self, step: Step) -> bool:
        """Tell whether the layer is compressed after a forward."""
        return step.prompt and not step.later


@dataclass(frozen=True)
class Every:
    """Compress after every prompt, and while decoding whenever ``interval`` tokens came since.

    Attributes:
        interval: decoded tokens between two compressions.
        bounded: whether no more tokens may come in between, those of prompts that are kept whole
            included.
    """

    interval: int
    bounded: bool = False
    decodes: bool = True

    def due(self, step: Step) -> bool:
        """Tell whether the layer is compressed after a forward."""
        if step.later:
            return self.bounded and step.since >= self.interval
        return step.prompt or step.since >= self.interval
