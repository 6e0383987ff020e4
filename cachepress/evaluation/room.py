"""Checks before a data set is generated that its contexts fit the model's positions."""

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.tasks.base import MOST_GENERATED, Task
from cachepress.models.loading import positions_of


def check_size(task: Task, config: EvaluationConfig) -> None:
    """Raise CachepressError if contexts of a data set cannot fit, before it is generated.

    Raises:
        CachepressError: if a context is longer than there is room for, and is not to be cut, or
            all of them together are more than any run reads.
    """
    if task.size is None:
        return
    size = task.size(config)
    what = f"{task.name}, data_dir={config.data_dir!r}"
    if size.total > MOST_GENERATED:
        raise CachepressError(
            f"{what}: its contexts have {size.total:.3g} tokens together, wanted at most "
            f"{MOST_GENERATED:.0e}: ask for fewer or shorter ones"
        )
    room = _room(config, size.beside)
    # Of a fraction of the contexts, nobody knows yet which ones they are.
    least = size.longest if config.fraction == 1 else size.shortest
    if room is not None and room < (1 if config.truncation else least):
        raise CachepressError(
            f"{what}: a context has at least {least} tokens, but there is room for "
            f"{max(0, room)} beside what is asked and answered: ask for less, or for truncation"
        )


def _room(config: EvaluationConfig, beside: int) -> int | None:
    """Compute the most tokens of a context, with ``beside`` tokens for question and answer."""
    limits = [config.max_context_length]
    if not config.beyond_trained_length:
        positions = positions_of(config.model, config.loading)
        limits.append(None if positions is None else positions - beside)
    return min((limit for limit in limits if limit is not None), default=None)
