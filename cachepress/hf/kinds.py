"""Which kind of cache ``generate`` makes: while a model is pressed, one that can be compressed."""

from threading import Lock
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

_LOCK = Lock()
_SAID: WeakKeyDictionary[PreTrainedModel, tuple[str, int]] = WeakKeyDictionary()
"""What the generation configs of pressed models say of the kind of cache, and how often they are
pressed."""


def set_kind_aside(model: PreTrainedModel) -> bool:
    """Let a model's ``generate`` make an ordinary cache, or take one, whatever its own config says.

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
    """Undo one ``set_kind_aside``; the last one gives the config back what it said."""
    with _LOCK:
        said, pressed = _SAID.pop(model)
        if pressed > 1:
            _SAID[model] = (said, pressed - 1)
        elif (config := model.generation_config).cache_implementation is None:  # type: ignore
            config.cache_implementation = said  # type: ignore
