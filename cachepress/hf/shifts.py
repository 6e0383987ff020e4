"""Keeps with a cache by how much the positions of its text differ from the number of its tokens.

The tokens of a picture may take fewer positions than they are many (Qwen2-VL). transformers keeps
the difference on the model, of the text that was read last: a cache that is loaded from a file, or
gone back to after another text, would go on at positions that are not its own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

SHIFT = "rope_deltas"
"""The attribute in which a cache keeps its shift, named as that of transformers' models."""


def note_shift(cache: Cache, given: Mapping[str, object], seen: int) -> None:
    """Record the shift of a text from the arguments of the decoder's forward.

    Args:
        cache: the cache that the forward filled.
        given: the arguments by name.
        seen: text columns after the forward.
    """
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.ndim != 3:
        return
    # Of four rows the first one counts tokens of the text, for masks.
    last = positions[-3:].amax((0, 2))
    counted = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == seen
    count = mask.sum(-1) if counted and isinstance(mask, Tensor) else seen
    set_shift(cache, (last + 1 - count)[:, None])


def set_shift(cache: Cache, shift: Tensor | None) -> None:
    """Set the shift ``[B, 1]`` of a cache's text; None for not known."""
    setattr(cache, SHIFT, shift)


def shift_of(cache: Cache, model: nn.Module) -> Tensor | None:
    """Return by how much positions differ from the number of tokens, ``[B, 1]``; None if never.

    That of a cache which no press observed is the shift of what the model read last.
    """
    return _shift(cache, _holder(model))


def shift_before(cache: Cache, model: nn.Module, batch: int) -> Tensor | None:
    """Return the shift ``[B, 1]`` of text without pictures: 0 for a new text, else the cache's."""
    holder = _holder(model)
    if not cache.get_seq_length() and holder is not None:
        set_shift(cache, torch.zeros(batch, 1, dtype=torch.long))
    return _shift(cache, holder)


def use_shift(cache: Cache, model: nn.Module) -> None:
    """Let a model go on at the positions of the text that a cache holds."""
    holder = _holder(model)
    shift = _shift(cache, holder)
    if holder is not None and shift is not None:
        setattr(holder, SHIFT, shift.to(next(model.parameters()).device))


def check_shift(shift: Tensor) -> None:
    """Raise ValueError unless a tensor can be a cache's shift."""
    if shift.dtype != torch.int64 or shift.ndim != 2 or shift.shape[1] != 1:
        raise ValueError(f"a shift of positions is no {shift.dtype} of shape {tuple(shift.shape)}")


def _shift(cache: Cache, holder: nn.Module | None) -> Tensor | None:
    if holder is None:
        return None
    shift = getattr(cache, SHIFT, None)
    return getattr(holder, SHIFT) if shift is None else shift


def _holder(model: nn.Module) -> nn.Module | None:
    """Find the module of a model that has ``rope_deltas``: the shift of the text read last."""
    return next((module for module in model.modules() if SHIFT in vars(module)), None)
