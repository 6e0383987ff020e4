"""Reads the attention mask of a forward, over queries and text columns."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.errors import UnsupportedError
from cachepress.ops import wide

T = TypeVar("T")
_LOWEST = torch.finfo(torch.float32).min


class TextMask:
    """Attention mask of a forward: what each query may attend to; all its layers share one.

    Args:
        mask: None for causal attention, ``[B, S]`` which columns are tokens, or ``[B, heads, n,
            S]``, bool (True is visible) or added to the logits.
        n: queries of the forward, the last n text columns.
        memo: what was computed from the mask before; it never holds the mask itself.
    """

    def __init__(self, mask: object, n: int, memo: dict[object, object] | None = None) -> None:
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim in (2, 4)):
            kind = f"{mask.ndim}-D" if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedError(
                f"a {kind} attention mask cannot be read by a compressed cache: load the model "
                'with attn_implementation="sdpa" or "eager"'
            )
        self._mask, self._n = mask, n
        self._memo = {} if memo is None else memo

    def of_sequences(self, first: int, last: int) -> "TextMask":
        """Restrict the mask to some of the sequences."""
        if self._mask is None or self._mask.shape[0] == 1:
            return self
        memo = self._once(("sequences", first, last), dict)
        return TextMask(self._mask[first:last], self._n, memo)

    def _once(self, name: object, make: Callable[[], T]) -> T:
        """Compute ``make()`` once for all layers of a forward."""
        if name not in self._memo:
            self._memo[name] = make()
        return cast(T, self._memo[name])

    @property
    def is_causal(self) -> bool:
        """Whether each query sees all tokens up to itself, since the model made no mask."""
        return self._mask is None

    @property
    def per_head(self) -> bool:
        """Whether each head has a mask of its own."""
        return self._mask is not None and self._mask.ndim == 4 and self._mask.shape[1] > 1

    @property
    def given(self) -> Tensor | None:
        """The mask as the model made it, clamped to the lowest float32.

        Functions of transformers take the softmax of a float64 model in float32, where the lowest
        float64 is -inf, and a query that may attend to nothing, as one of padding, becomes NaN.
        """
        mask = self._mask
        if mask is None or mask.dtype != torch.float64:
            return mask
        return self._once("given", lambda: mask.clamp(min=_LOWEST))

    @property
    def valid(self) -> Tensor | None:
        """Which text columns are tokens, ``[B, S]``: those that the last token may attend to."""
        mask = self._mask
        return None if mask is None else self._once("valid", lambda: self._valid(mask))

    def _valid(self, mask: Tensor) -> Tensor | None:
        last = mask if mask.ndim == 2 else mask[:, 0, -1]
        valid = last.bool() if last.dtype == torch.bool or mask.ndim == 2 else last == 0
        # A copy, because cache layers remember it, and would hold the whole mask with a view of it.
        return None if bool(valid.all()) else valid.clone()

    @property
    def by_head(self) -> Tensor:
        """Bias to add to logits, ``[B, 1 or heads, n, S]``, where there is a mask."""
        mask = self._mask
        assert mask is not None
        return self._once("by head", lambda: self._by_head(mask))

    def _by_head(self, mask: Tensor) -> Tensor:
        if mask.ndim == 4:
            return _bias(mask)
        s = mask.shape[1]
        causal = torch.ones(self._n, s, dtype=torch.bool, device=mask.device).tril_(s - self._n)
        return _bias(mask.bool()[:, None, None] & causal)

    def of_rows(self, end: int, text_valid: Tensor | None) -> Tensor | None:
        """Return the bias ``[B, n, S]`` if it hides a token before ``end`` from a query, else None.

        Args:
            end: a text column before those of this forward.
            text_valid: ``[B, S]`` of the first columns, False where no pair of it is held; None
                where all are.
        """
        if self._mask is None:
            return None
        hides = partial(_hides_any, self._mask, end, text_valid)
        hidden = self._once(("hides", end, id(text_valid)), hides)
        return self.by_head[:, 0] if hidden else None

    def of_columns(self, start: int, end: int, device: torch.device) -> Tensor | None:
        """Return the bias of columns from ``start`` to ``end``, ``[B or 1, n, end - start]``."""
        if self._mask is not None:
            if self._mask.ndim == 4:
                return _bias(self._mask[:, 0, :, start:end])
            return self.by_head[:, 0, :, start:end]
        if self._n == 1:
            return None
        n, columns = self._n, end - start
        visible = torch.ones(1, n, columns, dtype=torch.bool, device=device).tril_(columns - n)
        return _bias(visible)


class BiasedMask(TextMask):
    """Attention mask with a position bias, which differs from head to head.

    Args:
        mask: as for ``TextMask``.
        n: queries of the forward.
        bias: ``[B or 1, heads, n, S]``, added to the logits.
    """

    def __init__(self, mask: object, n: int, bias: Tensor) -> None:
        super().__init__(mask, n)
        self._added = bias

    @property
    def per_head(self) -> bool:
        """Return True: each head has a mask of its own."""
        return True

    @property
    def given(self) -> Tensor:
        """The mask and the bias together, in the type of the bias."""
        lowest = max(_LOWEST, torch.finfo(self._added.dtype).min)
        return self.by_head.clamp(min=lowest).to(self._added.dtype)

    @property
    def by_head(self) -> Tensor:
        """Bias to add to logits, ``[B, heads, n, S]``."""
        return self._once("biased", self._biased)

    def _biased(self) -> Tensor:
        bias, s = wide(self._added), self._added.shape[-1]
        if self._mask is not None:
            return bias + self._by_head(self._mask)[..., :s]
        visible = torch.ones(self._n, s, dtype=torch.bool, device=bias.device).tril_(s - self._n)
        return bias + _bias(visible)

    def of_sequences(self, first: int, last: int) -> "TextMask":
        """Raise UnsupportedError: only models with attention alone are read in groups."""
        raise UnsupportedError("a position bias cannot be read in groups of sequences")


class MaskReader:
    """Reads the mask of a forward once for all layers of a cache, which share the reader.

    What was read is forgotten with the mask, and read anew for the next forward or when the mask
    was written to since.
    """

    def __init__(self) -> None:
        self._mask: Callable[[], object] = _nothing
        self._module: Callable[[], object] = _nothing
        self._version: int | None = None
        self._memo: dict[object, object] = {}

    def __reduce__(self) -> tuple[type["MaskReader"], tuple[()]]:
        """Pickle and copy as a reader that has read no mask yet."""
        return MaskReader, ()

    def read(self, mask: object, n: int, module: object) -> TextMask:
        """Read the mask of ``n`` queries, for the attention of a module."""
        if not isinstance(mask, Tensor):
            return TextMask(mask, n)
        # Torch counts no writes to tensors of inference mode.
        version = None if mask.is_inference() else mask._version
        # The module that asked first asks again: that is another forward.
        same = self._mask() is mask and self._version == version and self._module() is not module
        if not same:
            memo: dict[object, object] = {}
            self._mask = weakref.ref(mask, lambda _: memo.clear())
            self._module, self._version, self._memo = weakref.ref(module), version, memo
        return TextMask(mask, n, self._memo)


def _nothing() -> None:
    """Return None, as a weak reference to a deleted object does."""


def _hides_any(mask: Tensor, end: int, text_valid: Tensor | None) -> bool:
    """Tell whether a mask hides any token among the first columns from any query."""
    hidden = _hidden(mask, end)
    if text_valid is not None:
        hidden = hidden & F.pad(text_valid, (0, end - text_valid.shape[1]), value=True)[:, None]
    return bool(hidden.any())


def _hidden(mask: Tensor, end: int) -> Tensor:
    """Tell which of the first columns are hidden from which query, ``[B, n or 1, end]``."""
    if mask.ndim == 2:
        return ~mask[:, None, :end].bool()
    first = mask[:, 0, :, :end]
    return ~first if mask.dtype == torch.bool else first != 0


def bias_of_pairs(mask: Tensor, positions: Tensor, own: Tensor | None = None) -> Tensor:
    """Gather a mask ``[B, n, S]`` at ``positions [F, H, N]``: a bias ``[B, H, 1, n, N]``.

    The ``F`` sequences stand for all, in turns. The pairs' ``own [B, H, N]`` bias is added.
    """
    b, n, s = mask.shape
    h = positions.shape[1]
    column = positions.clamp(min=0).long().repeat(b // positions.shape[0], 1, 1)[:, :, None]
    picked = mask[:, None].expand(b, h, n, s).gather(-1, column.expand(-1, -1, n, -1))
    if own is not None:  # Two times the lowest number would be no number.
        picked = (picked + own[:, :, None]).clamp(min=_LOWEST)
    return picked.unsqueeze(2)


def _bias(mask: Tensor) -> Tensor:
    """Turn a mask, bool or added to logits, into a bias to add, at least float32."""
    if mask.dtype != torch.bool:
        # The lowest number of a half type is far from that of float32.
        hidden = mask <= torch.finfo(mask.dtype).min
        return wide(mask).clamp(min=_LOWEST).masked_fill(hidden, _LOWEST)
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_fill_(~mask, _LOWEST)
