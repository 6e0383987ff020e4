"""SimLayerKV: layers that attend to the first and newest tokens only keep no others."""

from dataclasses import dataclass

from torch import Tensor

from cachepress.budgets import CHOSEN, Ratio, Threshold, TopK, check_fraction
from cachepress.checks import check_count
from cachepress.press import BasePress
from cachepress.ranks import choose
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class SimLayerKVPress(BasePress, alias="simlayerkv"):
    """Keeps only the first and newest tokens in lazy layers, which attend to little else.

    Zhang et al., "SimLayerKV: A Simple Framework for Layer-Level KV Cache Reduction"
    (arXiv:2410.13846). A layer is lazy if its last queries pay more than ``lazy_threshold`` of
    their attention to those tokens, on average over the heads; other layers keep every token. Each
    sequence of a batch and each prompt is judged by itself; what a lazy layer evicted stays so. The
    authors' thresholds are 0.9 for Llama-3-8B, 0.8 for Mistral-7B, 0.85 for Qwen2 and 0.65 for
    Llama-2-7B. How many tokens stay depends on the text, so there is no ratio to set. Needs the
    last ``n_last`` queries.
    Best for long contexts that most layers hardly attend to.

    Attributes:
        lazy_threshold: share of the attention above which a layer is lazy; 1 for never.
        n_last: queries at the end of the prompt that are observed.
        n_recent: newest tokens that a lazy layer keeps.
        n_initial: first tokens that a lazy layer keeps.
    """

    lazy_threshold: float = 1.0
    n_last: int = 1
    n_recent: int = 1024
    n_initial: int = 4

    def __post_init__(self) -> None:
        check_fraction(self.lazy_threshold, "lazy_threshold")
        check_count(self, "n_last")
        check_count(self, "n_recent")
        check_count(self, "n_initial", least=0)

    @property
    def needs(self) -> Needs:
        """The last queries."""
        return Needs(queries=self.n_last)

    @property
    def budget(self) -> TopK | Threshold:
        """The pairs that the score chooses."""
        return CHOSEN if self.lazy_threshold < 1 else TopK(Ratio(0.0))

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by index, those kept above all others, ``[B, H, T]``."""
        newest = view.index >= view.n_seen[:, None, None] - self.n_recent
        near = view.valid & (newest | (view.index < self.n_initial))
        attention = view.window_attention(self.n_last)  # [B, H, G, T]
        share = (attention * near.unsqueeze(2)).sum(-1).mean((1, 2))  # [B]
        lazy = (share > self.lazy_threshold)[:, None, None]
        return choose(view.index.float(), near | (view.valid & ~lazy))
