"""Compactor: tokens that their passage attends to, or whose keys are unlike all others."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.limits import MOST
from cachepress.ops import wide_dtype
from cachepress.press import ScorerPress
from cachepress.presses.leverage import LeverageScorePress
from cachepress.presses.noncausal import NonCausalAttnPress
from cachepress.ranks import pin_sinks, pin_window
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class CompactorPress(ScorerPress, alias="compactor"):
    """Keeps tokens with much non-causal attention from their passage, or high key leverage.

    Chari and Van Durme, "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate
    Leverage Scores" (arXiv:2507.08143). The score is that of ``NonCausalAttnPress`` plus
    ``blending`` times that of ``LeverageScorePress``, both standardised, over the tokens between
    the pinned ones, as if they were a text of their own. Needs all queries and the layer's rotary
    embedding.

    Chosen where the paper says nothing: ``blending`` is by default the fraction of the tokens
    seen that the budget removes; where the budget cannot hold all pinned tokens the newest are
    evicted before the first; tokens that are pinned no longer at a later prompt count as average
    in attention.
    Best for long contexts whose questions are not known when they are compressed.

    Attributes:
        sink_size_start: first tokens, which always stay.
        sink_size_end: newest tokens, which always stay.
        chunk_size: tokens of a chunk of the attention, counted from the first token not pinned.
        sketch_dimension: channels of the random projection of the keys.
        blending: weight of the leverage; None for the fraction removed.
    """

    sink_size_start: int = 8
    sink_size_end: int = 4
    chunk_size: int = 256
    sketch_dimension: int = 48
    blending: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "sink_size_start", least=0)
        check_count(self, "sink_size_end", least=0)
        check_count(self, "chunk_size")
        check_count(self, "sketch_dimension", most=MOST)
        given = 0 if self.blending is None else self.blending
        number = isinstance(given, int | float) and not isinstance(given, bool)
        if not number or not 0 <= given < float("inf"):
            raise CachepressError(
                f"blending: got {given!r}, wanted a number >= 0, or None for the fraction removed"
            )

    @property
    def needs(self) -> Needs:
        """What attention and leverage need."""
        return self._attention.needs | self._leverage.needs

    def token_state(self, view: LayerView) -> Tensor:
        """Attention received so far by each pair between the pinned ones, ``[B, H, T]``."""
        free = self._free(view)
        return torch.where(free.valid, self._attention.token_state(free), torch.nan)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by attention plus weighted leverage, pinned above all, ``[B, H, T]``."""
        free, weight = self._free(view), self.blending
        if weight is None:
            removed = 1 - view.n_kept.double() / view.n_seen.clamp(min=1)  # [B]
            weight = removed.clamp(min=0)[:, None, None].to(wide_dtype(view.keys))
        scores = self._attention.score(free) + weight * self._leverage.score(free)
        scores = pin_window(scores, view, self.sink_size_end)
        return pin_sinks(scores, view, self.sink_size_start)

    @property
    def _attention(self) -> NonCausalAttnPress:
        return NonCausalAttnPress(chunk_size=self.chunk_size)

    @property
    def _leverage(self) -> LeverageScorePress:
        return LeverageScorePress(sketch_dimension=self.sketch_dimension)

    def _free(self, view: LayerView) -> LayerView:
        """View the tokens between the pinned ones, and their queries, as a text of their own."""
        first, end = self.sink_size_start, view.n_seen[:, None, None] - self.sink_size_end
        free = (view.index >= first) & (view.index < end)
        if view.voters is None:
            raise TypeError("the view was made without queries")
        newest = free[:, 0, free.shape[-1] - view.voters.shape[1] :]  # [B, Q]
        voters = view.voters & newest
        return replace(view.only(free), index=view.index - first, voters=voters)
