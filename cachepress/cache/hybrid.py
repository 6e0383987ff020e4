"""The compressed layer of models whose layers have attention and a recurrent state side by side."""

import copy
from typing import Self

import torch
from torch import Tensor
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from cachepress.cache.layer import CompressedLayer
from cachepress.errors import UnsupportedError

_OF_PAIRS = {*vars(LinearAttentionAndFullAttentionLayer())} - {*vars(LinearAttentionLayer())}
"""What an ordinary layer of this kind has besides its recurrent state: its keys and values."""


class CompressedHybridLayer(CompressedLayer, LinearAttentionLayer):
    """Compressed layer that keeps the recurrent state of transformers' own layer beside its pairs.

    The state has a fixed size and stays as it is; pairs are evicted as in any other layer.
    """

    _traceable = False

    def __init__(self) -> None:
        LinearAttentionLayer.__init__(self)
        CompressedLayer.__init__(self)

    @classmethod
    def adopt_layer(cls, layer: LinearAttentionLayer) -> Self:
        """Make a compressed layer that goes on where an ordinary one is."""
        made = cls.adopt(getattr(layer, "keys", None), getattr(layer, "values", None))
        assert isinstance(made, cls)
        own = {name: x for name, x in vars(layer).items() if name not in _OF_PAIRS}
        vars(made).update(copy.deepcopy(own))
        return made

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the recurrent state can be put back."""
        of_state = getattr(LinearAttentionLayer, "is_croppable", False)
        return bool(of_state.__get__(self) if isinstance(of_state, property) else of_state)

    def lazy_initialization(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *args: object, **kwargs: object
    ) -> None:
        """Make the buffers of the recurrent state; those of pairs are made with the first pairs."""
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)  # pyright: ignore

    def form(self) -> tuple[object, ...]:
        """Raise UnsupportedError: recurrent states of several caches are not joined."""
        raise UnsupportedError("caches with recurrent states cannot be joined: decode one by one")

    def fork(self) -> "CompressedHybridLayer":
        """Fork the layer: the fork shares its pairs, and has a state of its own."""
        forked = super().fork()
        assert isinstance(forked, CompressedHybridLayer)
        for name in vars(LinearAttentionLayer()):
            vars(forked)[name] = copy.deepcopy(vars(self)[name])
        return forked

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last text columns, where the recurrent state can be put back."""
        n = self.get_seq_length()
        last = tokens_to_remove - n if tokens_to_remove > 0 else tokens_to_remove
        if last >= 0 or not self.is_initialized:
            return
        if not self.is_croppable:
            raise UnsupportedError(
                f"cannot crop {-last} tokens: the layer's recurrent state cannot be put back to "
                "where it was before them; fork the cache before they are read"
            )
        LinearAttentionLayer.crop(self, last)
        super().crop(last)

    def reset(self) -> None:
        """Remove all pairs, and the state."""
        LinearAttentionLayer.reset(self)
        state = {name: vars(self)[name] for name in vars(LinearAttentionLayer())}
        super().reset()
        vars(self).update(state)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the sequences by those of ``beam_idx [B']``, which may repeat."""
        LinearAttentionLayer.reorder_cache(self, torch.as_tensor(beam_idx))  # pyright: ignore
        super().reorder_cache(beam_idx)
