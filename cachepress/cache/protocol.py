"""What transformers asks of a cache layer that has no maximum length and stays where it is."""

from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from cachepress.errors import UnsupportedError


class GrowingLayer(CacheLayerMixin):
    """Cache layer that grows with its text: the part of the protocol that says no more than that.

    Subclasses store the pairs, and say how many sequences and text columns there are.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 before the first forward."""
        raise NotImplementedError

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: buffers are made when the first pairs arrive."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times, one after the other."""
        batch = torch.arange(max(self.batch_size, 0))
        self.reorder_cache(cast(torch.LongTensor, batch.repeat_interleave(repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of ``indices`` only."""
        batch = torch.arange(max(self.batch_size, 0), device=indices.device)
        chosen = batch[indices] if self.is_initialized else batch
        self.reorder_cache(cast(torch.LongTensor, chosen))

    def offload(self) -> None:
        """Raise UnsupportedError: offloaded layers move their pairs themselves."""
        raise UnsupportedError(
            "a compressed cache is offloaded by cachepress.prefill(..., offload=True), and not by "
            "transformers"
        )

    prefetch = offload
