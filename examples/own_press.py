"""A method of your own: one class with a score.

``score`` gets a view of one layer and says how much each token is worth to each head. Budgets,
padding, chunks, per-head competition and storage come with it, and so do the wrappers.
"""

from dataclasses import dataclass

from torch import Tensor

import cachepress as cp
from cachepress.models import load


@dataclass(frozen=True)
class SurprisePress(cp.ScorerPress, alias="surprise"):
    """Keeps the tokens whose keys differ most from the key of the token before them."""

    def score(self, view: cp.LayerView) -> Tensor:
        """Distance of each key to the one before it, ``[B, H, T]``; the first's to the last."""
        return (view.keys - view.keys.roll(1, dims=2)).norm(dim=-1)


model, tokenizer = load("smollm2-135m")
text = "The harbour opens at 6 in the morning. The name of the ship is Aurora. " * 20
ids = tokenizer(text, return_tensors="pt").input_ids
for press in (SurprisePress(0.5), cp.AdaKVPress(SurprisePress(0.5)), cp.parse("surprise(0.9)")):
    cache = cp.prefill(model, ids, press)
    print(f"{press}: {cp.size_of(cache).ratio:.1%} removed")
    print(" ", cp.ask(model, tokenizer, cache, "What is the ship called?", max_new_tokens=12))
