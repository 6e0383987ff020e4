"""Attention of an uncompressed model from which pairs are masked, head by head: the reference."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "masked_reference"


@contextmanager
def masked(model: PreTrainedModel, cache: Cache, kept: Mapping[int, Tensor]) -> Iterator[None]:
    """Mask pairs of an ordinary cache in the forwards of a model.

    Args:
        model: the decoder.
        cache: transformers' own cache.
        kept: which of the first text columns each head still attends to, ``[1, H, T]`` by layer.
    """
    base = model.config._attn_implementation
    own = dict(ALL_ATTENTION_FUNCTIONS).get(base)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: object,
        **options: object,
    ) -> object:
        function = own or vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        layer = next((i for i in kept if cache.layers[i].keys is key), None)
        if layer is not None:
            attention_mask = _with(attention_mask, query, key, kept[layer])
        return function(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation_internal = base


def _with(mask: object, query: Tensor, key: Tensor, kept: Tensor) -> Tensor:
    """Add to a mask what was evicted: ``[B, query heads, n, S]``, added to the logits."""
    (b, heads, n), s = query.shape[:3], key.shape[2]
    lowest = torch.finfo(query.dtype).min
    bias = torch.zeros(b, heads, n, s, dtype=query.dtype)
    if isinstance(mask, Tensor):
        hidden = ~mask if mask.dtype == torch.bool else mask < lowest / 2
        bias = bias.masked_fill(hidden[..., :s], lowest)
        if mask.dtype != torch.bool:
            bias = torch.where(bias == 0, mask[..., :s].to(bias.dtype), bias)
    elif n > 1:
        bias = bias.masked_fill(torch.ones(n, s).tril(s - n) == 0, lowest)
    gone = ~kept.repeat_interleave(heads // kept.shape[1], dim=1)
    bias[..., : gone.shape[-1]].masked_fill_(gone.unsqueeze(2), lowest)
    return bias
