"""The errors that cachepress raises: each says what was got, what was wanted and what to do."""


class CachepressError(ValueError):
    """Base class of every error that cachepress raises on purpose; its text is one line.

    Args:
        message: what is wrong; several lines, as in messages of other libraries, become one.
    """

    def __init__(self, message: str) -> None:
        lines = (line.strip() for line in message.splitlines())
        super().__init__(" ".join(line for line in lines if line))


class UnsupportedError(CachepressError):
    """A model, cache or combination is refused, because its result would be wrong."""


class ForeignAttentionError(CachepressError):
    """A compressed cache was given to an attention function that cannot read it."""


def cache_dropped() -> UnsupportedError:
    """Make the error for a model that was given a cache and went on without it."""
    return UnsupportedError(
        "the model goes on without its cache, as gradient checkpointing of transformers makes it: "
        "call model.gradient_checkpointing_disable() or model.eval(), or checkpoint a function of "
        "your own that continues cachepress.fork(cache)"
    )


def out_of_memory(error: BaseException) -> CachepressError:
    """Make the error for memory that ran out while a model was loaded or run."""
    said = (str(error).strip() or "none was left").splitlines()[0]
    return CachepressError(
        f"out of memory: {said[:200]}; give a smaller batch size, a prefill chunk size, a shorter "
        "context, or a smaller model or dtype; nothing that was computed is lost"
    )
