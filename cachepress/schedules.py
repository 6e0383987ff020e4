"""Schedules: when a layer is settled."""

from dataclasses import dataclass

from cachepress.core import Step


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
