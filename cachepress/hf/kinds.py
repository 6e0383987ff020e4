"""Lets ``generate`` make a cache that can be compressed while a model is pressed.

A model's generation config may name another kind of cache (``cache_implementation``).
"""

from threading import Lock
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

_LOCK = Lock()
_SAID: WeakKeyDictionary[PreTrainedModel, tuple[str, int]] = WeakKeyDictionary()
"""The kind of cache that the generation config of each pressed model names, and how many presses
are on the model: several may be, in several threads, and the last one restores the config."""


def set_kind_aside(model: PreTrainedModel) -> bool:
    """Let a model's ``generate`` make or take a ``DynamicCache``, whatever its config names.

    Returns:
        Whether ``bring_kind_back`` has to follow.
    """
    config = getattr(model, "generation_config", None)
    with _LOCK:
        said, pressed = _SAID.get(model, (getattr(config, "cache_implementation", None), 0))
        if said is None:
            return False
        _SAID[model] = (said, pressed + 1)
        config.cache_implementation = None  # pyright: ignore[reportOptionalMemberAccess]
    return True


def bring_kind_back(model: PreTrainedModel) -> None:
    """Undo one ``set_kind_aside``; the last one restores the generation config."""
    with _LOCK:
        said, pressed = _SAID.pop(model)
        if pressed > 1:
            _SAID[model] = (said, pressed - 1)
        elif (config := model.generation_config).cache_implementation is None:  # type: ignore
            config.cache_implementation = said  # type: ignore
