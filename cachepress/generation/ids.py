"""Reads token ids as people give them: a tensor, lists, or what a tokenizer returned."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cachepress.errors import CachepressError
from cachepress.limits import shown

_WANTED = 'wanted token ids [B, T], such as tokenizer(text, return_tensors="pt") gives'


def token_ids(given: object, mask: object = None) -> tuple[Tensor, Tensor | None]:
    """Return the token ids ``[B, T]`` and the attention mask that an argument means.

    Args:
        given: a tensor, a list of ids or of lists of them, or a mapping that has ``input_ids``, as
            a tokenizer returns it; its attention mask counts unless ``mask`` is given.
        mask: the attention mask.

    Raises:
        CachepressError: if it is something else, such as a text.
    """
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise CachepressError(f"input_ids: got {shown(sorted(map(str, given)))}, {_WANTED}")
        for name, value in given.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                raise CachepressError(
                    f"input_ids: got {name} besides, and only tokens are read: use the pipeline, "
                    "with messages, or `with press(model): model(**inputs)`"
                )
        mask = given.get("attention_mask") if mask is None else mask
        given = given["input_ids"]
    if isinstance(given, str) or (isinstance(given, list | tuple) and str in map(type, given)):
        raise CachepressError(f"input_ids: got a text, {_WANTED}")
    return _rows("input_ids", given), None if mask is None else _rows("attention_mask", mask)


def _rows(name: str, given: object) -> Tensor:
    """Return whole numbers as a tensor, those of one text as its only row."""
    try:
        found = given if isinstance(given, Tensor) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(given, list | tuple) and all(isinstance(x, list | tuple) for x in given):
            raise CachepressError(
                f"{name}: got {len(given)} lists, which are no table of whole numbers: pad texts, "
                'tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")'
            ) from error
        raise CachepressError(f"{name}: got {shown(given)}, {_WANTED}") from error
    if name == "input_ids" and found.numel() and found.dtype not in (torch.int32, torch.int64):
        raise CachepressError(f"{name}: got {found.dtype}, {_WANTED}")
    return found.unsqueeze(0) if found.ndim == 1 else found
