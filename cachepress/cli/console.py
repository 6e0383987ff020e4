"""Prints to the terminal, sets up logging, and loads the model of a command."""

import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachepress.cli.arguments import Command
from cachepress.errors import CachepressError
from cachepress.limits import visible
from cachepress.options import BUILTIN

if TYPE_CHECKING:
    from cachepress.hf.types import PreTrainedModel, PreTrainedTokenizerBase
    from cachepress.presses import BasePress

logger = logging.getLogger(__name__)


class _Visible(logging.Formatter):
    """Log formatter that escapes control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def say(text: str = "") -> None:
    """Print a text with its control characters escaped."""
    print(visible(text))


def log(level: str = "INFO") -> None:
    """Log to stderr, and let transformers log errors only."""
    from cachepress.models.loading import be_quiet

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    be_quiet()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("cachepress").setLevel(level.upper())


def warn_if_nothing_evicted(press: "BasePress | None") -> None:
    """Warn if a press evicts nothing because it was named without a compression ratio."""
    try:
        nothing = press is not None and press.with_ratio(0.0) == press
    except CachepressError:
        return  # It has no ratio.
    if nothing:
        logger.warning("%r evicts nothing: give --compression-ratio, such as 0.5", press)


@dataclass(frozen=True, kw_only=True)
class OnModel(Command):
    """Command that loads a model.

    Attributes:
        model: a built-in name, a local folder, or a hub name (default: smollm2-135m).
        dtype: torch dtype by name.
        device: torch device.
        trust_remote_code: run the code that a model's repository brings, having read it.
    """

    model: str = BUILTIN
    dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False

    def loaded(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load the model and its tokenizer."""
        from cachepress.models.loading import load

        trust = {"trust_remote_code": self.trust_remote_code}
        return load(self.model, dtype=self.dtype, device=self.device, model_kwargs=trust)
