"""KVzip: what the model reads when it repeats its context."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.budgets import TopK, pin_sinks
from cachepress.ops import attention_weights
from cachepress.presses.base import ScorerPress, check_count
from cachepress.replay import Replay, ReplayView
from cachepress.view import LayerView, Needs

FIRST = "\n\nRepeat the text above, word for word."
LATER = "\n\nRepeat the text above, word for word, from where it says:"


@dataclass(frozen=True)
class KVzipPress(ScorerPress, alias="kvzip"):
    """Keeps the rows that the model reads to repeat the whole context, chunk by chunk.

    Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction"
    (arXiv:2505.23416). When the prompt is read, each chunk of it is fed once more after a request
    to repeat it; a row's score is the most attention that any of those queries gives it, among the
    chunk, the sinks and the replay itself. KVzip+ (Jegou and Jeblick, arXiv:2601.07891) weighs
    each attention by the size of what the value adds to the output over that of the query's hidden
    state, here the one that attention reads. Heads and layers compete, each with its own number of
    rows. Costs one to two further prefills. Rows of an earlier turn keep their scores. Best for
    contexts that are compressed once and asked many things.

    Attributes:
        layerwise: whether every layer gets the same share, so that only its heads compete.
        n_sink: first rows, which always stay.
        kvzip_plus_normalization: whether attentions are weighed; needs the output projection.
        chunk_size: tokens that are repeated in one forward.
    """

    layerwise: bool = False
    n_sink: int = 4
    kvzip_plus_normalization: bool = False
    chunk_size: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "n_sink", least=0)
        check_count(self, "chunk_size")

    @property
    def needs(self) -> Needs:
        """Nothing of the prompt's own forward."""
        return Needs()

    @property
    def budget(self) -> TopK:
        """The best rows of the model, or of each layer."""
        return replace(super().budget, scope="layer" if self.layerwise else "model")

    @property
    def carries(self) -> bool:
        """Whether rows can be dropped, so that the others must keep their scores."""
        return self.with_ratio(0.0) != self

    @property
    def replay(self) -> Replay | None:
        """The whole prompt, unless nothing will be dropped."""
        if not self.carries:
            return None
        plus = self.kvzip_plus_normalization
        return Replay(self.chunk_size, self.n_sink, FIRST, LATER, weighs=plus)

    def replayed(self, view: ReplayView) -> Tensor:
        """The most attention that each row of the chunk receives, ``[H, chunk]``."""
        of_rows, of_queries = self._weights(view)
        peaks = None
        for some, weights in attention_weights(view.queries, view.keys, view.valid, view.rule):
            weights = weights[..., view.chunk] * of_queries[:, None, None, some, None]
            most = weights.amax(-2) * of_rows  # [1, H, G, chunk]
            peaks = most if peaks is None else torch.maximum(peaks, most)
        assert peaks is not None
        return peaks.amax(2)[0]

    def score(self, view: LayerView) -> Tensor:
        """What the replay showed, ``[B, H, T]``."""
        return pin_sinks(self.carry(view), view, self.n_sink)

    def carry(self, view: LayerView) -> Tensor:
        """The score of each row, from this turn's replay or from an earlier one."""
        noted = view.noted
        if noted is None:
            noted = torch.full_like(view.index, float("nan"), dtype=torch.float32)
        return noted if view.carried is None else torch.where(noted.isnan(), view.carried, noted)

    def _weights(self, view: ReplayView) -> tuple[Tensor, Tensor]:
        """Factors of the chunk's rows ``[1, H, G, chunk]`` and of the queries ``[1, n]``."""
        if not self.kvzip_plus_normalization:
            one = view.keys.new_ones(1, 1, dtype=torch.float32)
            return one[None, None], one.expand(1, view.queries.shape[3])
        assert view.hidden is not None
        return view.value_norms(), 1 / view.hidden.float().norm(dim=-1).clamp(min=1e-9)
