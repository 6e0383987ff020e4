"""The attention mask of one forward, read as a table of queries and text columns."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.errors import UnsupportedError
from cachepress.ops import wide

_LOWEST = torch.finfo(torch.float32).min


class TextMask:
    """What the queries of a forward may attend to; all layers of a forward share one.

    Args:
        mask: None for causal attention, ``[B, S]`` which columns are tokens, or ``[B, heads, n,
            S]``, bool (True is visible) or added to the logits.
        n: queries of the forward, the last n text columns.
    """

    def __init__(self, mask: object, n: int) -> None:
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim in (2, 4)):
            kind = f"{mask.ndim}-D" if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedError(
                f"a {kind} attention mask cannot be read by a compressed cache: load the model "
                'with attn_implementation="sdpa" or "eager"'
            )
        self._mask, self._n = mask, n
        self._seen: dict[tuple[int, int], bool] = {}
        self._parts: dict[tuple[int, int], TextMask] = {}

    def of_sequences(self, first: int, last: int) -> "TextMask":
        """The mask of some of the sequences."""
        if self._mask is None or self._mask.shape[0] == 1:
            return self
        key = (first, last)
        if key not in self._parts:
            self._parts[key] = TextMask(self._mask[first:last], self._n)
        return self._parts[key]

    @property
    def per_head(self) -> bool:
        """Whether heads have masks of their own."""
        return self._mask is not None and self._mask.ndim == 4 and self._mask.shape[1] > 1

    @cached_property
    def given(self) -> Tensor | None:
        """The mask as it came, none of it lower than float32 goes.

        Functions of transformers take the softmax of a float64 model in float32, where the lowest
        float64 is -inf, and a query that may attend to nothing, as one of padding, becomes NaN.
        """
        mask = self._mask
        return mask if mask is None or mask.dtype != torch.float64 else mask.clamp(min=_LOWEST)

    @cached_property
    def valid(self) -> Tensor | None:
        """Which text columns are tokens, ``[B, S]``: those that the last token may attend to."""
        mask = self._mask
        if mask is None:
            return None
        last = mask if mask.ndim == 2 else mask[:, 0, -1]
        valid = last.bool() if last.dtype == torch.bool or mask.ndim == 2 else last == 0
        # A copy, because stores remember it, and would hold the whole mask with a view of it.
        return None if bool(valid.all()) else valid.clone()

    @cached_property
    def by_head(self) -> Tensor:
        """Added to logits, ``[B, 1 or heads, n, S]`` where there is a mask."""
        mask = self._mask
        assert mask is not None
        if mask.ndim == 4:
            return _bias(mask)
        s = mask.shape[1]
        causal = torch.ones(self._n, s, dtype=torch.bool, device=mask.device).tril_(s - self._n)
        return _bias(mask.bool()[:, None, None] & causal)

    def of_rows(self, end: int, text_valid: Tensor | None) -> Tensor | None:
        """The bias ``[B, n, S]``, if it hides any token before ``end`` from any query; else None.

        Args:
            end: a text column before those of this forward.
            text_valid: ``[B, S]`` of the first columns, False where no pair of it is held; None
                where all are.
        """
        if self._mask is None:
            return None
        key = (end, id(text_valid))
        if key not in self._seen:
            hidden = _hidden(self._mask, end)  # [B, n or 1, end]
            if text_valid is not None:
                hidden = (
                    hidden & F.pad(text_valid, (0, end - text_valid.shape[1]), value=True)[:, None]
                )
            self._seen[key] = bool(hidden.any())
        return self.by_head[:, 0] if self._seen[key] else None

    def of_columns(self, start: int, end: int, device: torch.device) -> Tensor | None:
        """The bias of text columns from ``start`` to the last, ``[B or 1, n, end - start]``."""
        if self._mask is not None:
            if self._mask.ndim == 4:
                return _bias(self._mask[:, 0, :, start:end])
            return self.by_head[:, 0, :, start:end]
        if self._n == 1:
            return None
        n, columns = self._n, end - start
        visible = torch.ones(1, n, columns, dtype=torch.bool, device=device).tril_(columns - n)
        return _bias(visible)


def _hidden(mask: Tensor, end: int) -> Tensor:
    """Which of the first columns are hidden from which query, ``[B, n or 1, end]``."""
    if mask.ndim == 2:
        return ~mask[:, None, :end].bool()
    first = mask[:, 0, :, :end]
    return ~first if mask.dtype == torch.bool else first != 0


def _bias(mask: Tensor) -> Tensor:
    """A mask, bool or added to logits, as one that is added, at least float32."""
    if mask.dtype != torch.bool:
        return wide(mask).clamp(min=_LOWEST)
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, _LOWEST)
