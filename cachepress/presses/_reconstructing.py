"""What presses share that let the model repeat its context."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.budgets import TopK
from cachepress.checks import check_count
from cachepress.ops import attention_weights, wide_dtype
from cachepress.press import ScorerPress
from cachepress.presses._scores import noted_or_carried, unknown_as_average
from cachepress.ranks import pin_first, pin_sinks
from cachepress.reconstruction import Reconstruction, ReconstructionView
from cachepress.view import LayerView, Needs

FIRST = "\n\nRepeat the text above, word for word."
LATER = "\n\nRepeat the text above, word for word, from where it says:"


@dataclass(frozen=True)
class _ReplayPress(ScorerPress):
    """A press whose scores are what the model reads while it repeats the prompt.

    Rows that were never repeated, such as decoded tokens, count as average. What the chat template
    puts before the context always stays, and is what the repeating queries see as sinks.

    Attributes:
        layerwise: whether every layer gets the same share, so that only its heads compete.
        n_sink: first rows, which always stay.
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
        """The whole prompt, unless nothing will be evicted; scores are kept."""
        if self.with_ratio(0.0) == self:
            return Needs()
        return Needs(reconstruction=self._reconstruction, token_state=True)

    @property
    def budget(self) -> TopK:
        """The best rows of the model, or of each layer."""
        return replace(super().budget, scope="layer" if self.layerwise else "model")

    @property
    def _reconstruction(self) -> Reconstruction:
        return Reconstruction(self.chunk_size, self.n_sink, FIRST, LATER)

    def reconstructed(self, view: ReconstructionView) -> Tensor:
        """The most attention, weighed, that each row of the chunk receives, ``[H, chunk]``."""
        of_rows, of_queries = self.weights(view)
        peaks = view.keys.new_zeros((), dtype=wide_dtype(view.keys))
        for some, weights in attention_weights(view.queries, view.keys, view.valid, view.rule):
            weights = weights[..., view.chunk] * of_queries[:, None, None, some, None]
            peaks = torch.maximum(peaks, weights.amax(-2) * of_rows)  # [1, H, G, chunk]
        return peaks.amax(2)[0]

    def weights(self, view: ReconstructionView) -> tuple[Tensor, Tensor]:
        """Factors of the chunk's rows ``[1, H or 1, G or 1, chunk or 1]`` and of the queries."""
        one = torch.ones(1, 1, device=view.keys.device)
        return one[None, None], one.expand(1, view.queries.shape[3])

    def score(self, view: LayerView) -> Tensor:
        """What the replay showed, ``[B, H, T]``."""
        token_state = self.token_state(view)
        scores = unknown_as_average(token_state, view.valid)
        return pin_sinks(pin_first(scores, view, token_state.isposinf()), view, self.n_sink)

    def token_state(self, view: LayerView) -> Tensor:
        """The score of each row, from this turn's replay or from an earlier one."""
        return replayed_or_carried(view)


def replayed_or_carried(view: LayerView) -> Tensor:
    """What a replay showed of each row, ``[B, H, T]``, else what an earlier one left; or NaN."""
    hidden_feature = view.hidden_feature
    if hidden_feature is None:
        hidden_feature = torch.full_like(view.index, float("nan"), dtype=wide_dtype(view.keys))
    return noted_or_carried(view, hidden_feature)
