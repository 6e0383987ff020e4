"""The cache that a model sees while a decoded step is recorded, in place of any one cache.

Its layers hold no pairs. They pass a token's keys and values on to attention, which appends them
where tables on the device say, so that one recording serves every cache that the tables describe.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from cachepress.cache.handle import RowsHandle, blank
from cachepress.cache.protocol import GrowingLayer
from cachepress.cache.traced import Number, pass_on
from cachepress.ops import AttentionRule

Attend = Callable[[int, Tensor, Tensor, Tensor, AttentionRule], Tensor]
"""Appends a token of a layer and attends: ``(layer, query, keys, values, rule)``."""


class StepHandle(RowsHandle):
    """Stands for a layer's keys or values in a recorded step.

    Attributes:
        read: attends for a query by the layer's rule, ``[B, 1, H * G, E]``.
    """

    read: Callable[[Tensor, AttentionRule], Tensor]

    @classmethod
    def standing(cls, like: Tensor, length: int, read: Callable[..., Tensor]) -> Self:
        """Make a handle with the type of ``like [B, H, 1, D]``, in the shape of ``length`` keys."""
        b, h, _, d = like.shape
        handle = blank(like.dtype, like.device).expand(b, h, length, d).as_subclass(cls)
        handle.read = read
        return handle


class _StepLayer(GrowingLayer):
    """Stand-in for a cache layer: hands the keys and values of one token to attention.

    Args:
        index: its index.
        window: text columns that a token sees, its own included; 0 for all.
        batch: sequences.
        seen: text columns seen.
        attend: what they are handed to.
    """

    is_initialized = True
    keys = values = None

    def __init__(self, index: int, window: int, batch: int, seen: int, attend: Attend) -> None:
        self._index, self._batch, self._seen, self._attend = index, batch, seen, attend
        self._number = Number(self)
        self.is_sliding = window > 0
        self._held = min(seen, window - 1) if window else seen

    @property
    def batch_size(self) -> int:
        return self._batch

    def get_seq_length(self) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of a mask, which nothing reads: attention has its own."""
        return self._held + int(query_length), self._seen - self._held

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_dynamo_compiling():
            return pass_on(self._number, key_states, value_states)

        def read(query: Tensor, rule: AttentionRule) -> Tensor:
            return self._attend(self._index, query, key_states, value_states, rule)

        keys = StepHandle.standing(key_states, self._held + 1, read)
        if key_states.shape == value_states.shape:
            return keys, keys
        return keys, StepHandle.standing(value_states, self._held + 1, read)

    def attend_token(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, rule: AttentionRule
    ) -> Tensor:
        """Append a token, and attend for its ``query [B, H * G, 1, D]``, ``[B, 1, H * G, E]``."""
        return self._attend(self._index, query, keys, values, rule)


def step_cache(windows: Sequence[int], batch: int, seen: int, attend: Attend) -> DynamicCache:
    """Make a cache that stands for one of ``batch`` texts of ``seen`` tokens in a recorded step.

    Args:
        windows: text columns that a token sees in each layer, its own included; 0 for all.
        batch: sequences.
        seen: text columns seen.
        attend: appends a token of a layer and attends.
    """
    with torch.inference_mode(False):
        cache = DynamicCache()
    cache.layers.extend(
        _StepLayer(i, window, batch, seen, attend) for i, window in enumerate(windows)
    )
    return cache
