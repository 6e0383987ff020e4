"""KeyDiff: keys that differ from the average key."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from cachepress.ops import blocks, by_token, wide, wide_dtype
from cachepress.press import ScorerPress
from cachepress.view import LayerView


@dataclass(frozen=True)
class KeyDiffPress(ScorerPress, alias="keydiff"):
    """Keeps the tokens whose keys point away from the mean direction of all keys.

    Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments" (arXiv:2504.15364). Needs nothing but keys. Best for
    prompts that are read in chunks and compressed after each.
    """

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by minus the cosine of key and mean direction, ``[B, H, T]``."""
        keys, valid = view.keys, view.valid.unsqueeze(2).to(wide_dtype(view.keys))
        total = keys.new_zeros(*keys.shape[:2], 1, keys.shape[-1], dtype=valid.dtype)
        for some in blocks(keys.shape[2], keys[:, :, :1].numel()):
            total += valid[..., some] @ F.normalize(wide(keys[:, :, some]), dim=-1)
        mean = F.normalize(total, dim=-1).mT
        return -by_token(lambda k: (F.normalize(wide(k), dim=-1) @ mean).squeeze(-1), keys)
