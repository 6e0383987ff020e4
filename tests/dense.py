"""A reference for compressed caches: transformers' own cache, with evicted pairs hidden by hand.

It knows nothing of pages, tails and masks over rows: every pair is there, and the attention of the
reference model leaves out those that the compressed cache does not hold.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from cachepress.cache.batch import compressed_layers
from cachepress.hf import cache_argument

REFERENCE = "dense_reference"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **options: object,
) -> tuple[Tensor, None]:
    """Attention in float64 over all columns but those that are hidden, by layer and KV head."""
    groups = query.shape[1] // key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (x.double() for x in (query, key, value))
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        n, s = q.shape[2], k.shape[2]
        visible = torch.ones(n, s, dtype=torch.bool).tril(s - n)[None, None]
        if attention_mask is not None:
            visible = visible & (
                attention_mask == 0 if attention_mask.dtype != torch.bool else attention_mask
            )
        hidden = getattr(module, "hidden_columns", None)
        if hidden is not None:
            gone = torch.zeros(*hidden.shape[:2], s, dtype=torch.bool)
            gone[..., : hidden.shape[-1]] = hidden
            visible = visible & ~gone.repeat_interleave(groups, dim=1).unsqueeze(2)
        logits = q @ k.mT * scaling
        bias = getattr(module, "bias_of_columns", None)
        if bias is not None:
            logits[..., : bias.shape[-1]] += bias.repeat_interleave(groups, dim=1).unsqueeze(2)
        logits = logits.masked_fill(~visible, torch.finfo(torch.float64).min)
        out = logits.softmax(-1) @ v
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register(REFERENCE, _attention)
AttentionMaskInterface.register(REFERENCE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def hiding(model: PreTrainedModel, compressed: Cache, seen: int) -> Iterator[None]:
    """Hide of the first ``seen`` columns what a compressed cache does not hold, in each head.

    A bias of the pairs that it holds is added to the logits of their columns.
    """
    layers = {
        m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "q_proj")
    }
    for index, store in enumerate(compressed_layers(compressed)):
        positions = store.positions.long()
        held = torch.zeros(*positions.shape[:2], store.get_seq_length() + 1, dtype=torch.bool)
        columns = positions.masked_fill(positions < 0, held.shape[-1] - 1)
        held.scatter_(-1, columns, True)
        layers[index].hidden_columns = ~held[..., :seen]
        pair_bias = store.snapshot.rows().bias
        if pair_bias is not None:
            spread = torch.zeros(held.shape, dtype=torch.float64)
            spread = spread.scatter_(-1, columns, pair_bias.double())
            layers[index].bias_of_columns = spread[..., :seen]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.hidden_columns
            vars(layer).pop("bias_of_columns", None)


def dense_logits(
    model: PreTrainedModel,
    compressed: Cache,
    ids: Tensor,
    question: Tensor,
    mask: Tensor | None,
    embeds: Tensor | None = None,
) -> tuple[PreTrainedModel, Tensor]:
    """A reference model, and its logits of a question after a text.

    Of the text the pairs that are in ``compressed`` are visible, in each layer and head. The
    question is given by its ``embeds``, if there are any; then gradients go through these alone.
    """
    reference, cache = copy.deepcopy(model), DynamicCache()
    name, seen, n = cache_argument(reference), ids.shape[1], question.shape[1]
    with torch.set_grad_enabled(embeds is None and torch.is_grad_enabled()):
        reference(ids, **{name: cache}, **mask_and_positions(mask, 0, seen))
    reference.set_attn_implementation(REFERENCE)
    longer = None if mask is None else torch.cat([mask, torch.ones_like(question)], dim=1)
    given = {name: cache, **mask_and_positions(longer, seen, n)}
    given |= {"input_ids": question} if embeds is None else {"inputs_embeds": embeds}
    with hiding(reference, compressed, seen):
        return reference, reference(**given).logits


def mask_and_positions(mask: Tensor | None, seen: int, n: int) -> dict[str, Tensor]:
    """The mask and positions of a forward of ``n`` tokens after ``seen`` columns."""
    if mask is None:
        return {}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": mask, "position_ids": positions[:, seen : seen + n]}
