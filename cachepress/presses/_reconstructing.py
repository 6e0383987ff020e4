"""Base class of presses that score pairs by context reconstruction."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.budgets import TopK
from cachepress.checks import check_count
from cachepress.ops import attention_column_peaks, wide_dtype
from cachepress.press import ScorerPress
from cachepress.presses._scores import feature_or_state, nan_as_average
from cachepress.ranks import pin_first, pin_sinks
from cachepress.reconstruction import Reconstruction, ReconstructionView
from cachepress.view import LayerView, Needs

FIRST = "\n\nRepeat the text above, word for word."
LATER = "\n\nRepeat the text above, word for word, from where it says:"


@dataclass(frozen=True)
class _ReconstructionPress(ScorerPress):
    """A press that scores tokens by the attention they receive while the model repeats its prompt.

    Tokens that were never repeated, such as decoded ones, count as average. What the chat template
    puts before the context always stays, and is what the repeating queries see as sinks.

    Attributes:
        layerwise: whether every layer gets the same share, so that only its heads compete.
        n_sink: first tokens, which always stay.
        chunk_size: tokens that are repeated in one forward.
    """

    layerwise: bool = False
    n_sink: int = 4
    chunk_size: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "n_sink", least=0)
        check_count(self, "chunk_size")

    @property
    def needs(self) -> Needs:
        """A reconstruction of the prompt, unless nothing is evicted; scores are kept."""
        if self.with_ratio(0.0) == self:
            return Needs()
        return Needs(reconstruction=self._reconstruction, token_state=True)

    @property
    def budget(self) -> TopK:
        """The pairs with the highest scores in the model, or in each layer."""
        return replace(super().budget, scope="layer" if self.layerwise else "model")

    @property
    def _reconstruction(self) -> Reconstruction:
        return Reconstruction(self.chunk_size, self.n_sink, FIRST, LATER)

    def reconstructed(self, view: ReconstructionView) -> Tensor:
        """Take the largest weighted attention to each pair of the chunk, ``[H, chunk]``."""
        of_keys, of_queries = self.weights(view)
        inputs = view.queries, view.keys, view.valid, of_queries, view.rule
        peaks = attention_column_peaks(*inputs, columns=view.chunk)  # [1, H, G, chunk]
        return (peaks * of_keys).amax(2)[0]

    def weights(self, view: ReconstructionView) -> tuple[Tensor, Tensor]:
        """Factors of the chunk's pairs ``[1, H or 1, G or 1, chunk or 1]`` and of the queries."""
        one = view.keys.new_ones(1, 1, dtype=wide_dtype(view.keys))
        return one[None, None], one.expand(1, view.queries.shape[3])

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by the reconstruction, sinks and template above all, ``[B, H, T]``."""
        token_state = self.token_state(view)
        scores = nan_as_average(token_state, view.valid)
        # The template before the context was given infinity: it is never evicted.
        return pin_sinks(pin_first(scores, view, token_state.isposinf()), view, self.n_sink)

    def token_state(self, view: LayerView) -> Tensor:
        """The score of each pair, from this prompt's reconstruction or from an earlier one."""
        return reconstructed_or_state(view)


def reconstructed_or_state(view: LayerView) -> Tensor:
    """Take what reconstruction computed of each pair, now or before, ``[B, H, T]``; else NaN."""
    hidden_feature = view.hidden_feature
    if hidden_feature is None:
        hidden_feature = torch.full_like(view.index, float("nan"), dtype=wide_dtype(view.keys))
    return feature_or_state(view, hidden_feature)
