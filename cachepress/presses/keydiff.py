"""KeyDiff: keys that differ from the average key."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from cachepress.ops import wide
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
        directions = F.normalize(wide(view.keys), dim=-1)
        real = view.valid.unsqueeze(-1)
        anchor = (directions * real).sum(2, keepdim=True) / real.sum(2, keepdim=True)
        return -F.cosine_similarity(directions, anchor, dim=-1)
