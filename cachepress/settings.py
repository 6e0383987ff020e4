"""What holds for the whole process: whether decoded steps are recorded."""

import os

_RECORDED = os.environ.get("CACHEPRESS_RECORDED", "1") != "0"


def configure(*, recorded: bool) -> None:
    """Choose for the whole process how tokens are decoded from compressed caches on a GPU.

    Args:
        recorded: record a step once as a CUDA graph and replay it for the tokens that follow;
            False runs every step as transformers does. The environment variable
            ``CACHEPRESS_RECORDED=0`` says the same before the process starts.
    """
    global _RECORDED
    _RECORDED = recorded


def is_recorded() -> bool:
    """Tell whether decoded steps are recorded."""
    return _RECORDED
