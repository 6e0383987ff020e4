"""Schedules: when a layer is settled."""

from dataclasses import dataclass

from cachepress.core import Turn


@dataclass(frozen=True)
class AfterPrefill:
    """Settle after the prompt and after every further turn of several tokens; never in decode."""

    decodes: bool = False

    def due(self, turn: Turn) -> bool:
        """Whether a forward settles the layer."""
        return turn.prompt


@dataclass(frozen=True)
class Every:
    """Settle after the prompt, and in decode whenever ``interval`` tokens came since.

    Attributes:
        interval: tokens between two settles.
    """

    interval: int
    decodes: bool = True

    def due(self, turn: Turn) -> bool:
        """Whether a forward settles the layer."""
        return turn.prompt or turn.since >= self.interval
