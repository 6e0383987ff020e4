"""Schedules: when a layer is settled."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AfterPrefill:
    """Settle after the prompt and after every further turn of several tokens; never in decode."""

    def due(self, n_seen: int, n_new: int) -> bool:
        """Whether a forward of ``n_new`` tokens on ``n_seen`` earlier ones settles the layer."""
        return n_new > 1
