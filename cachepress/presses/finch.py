"""Finch: tokens that the question attends to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.ops import attention_column_sums
from cachepress.press import ScorerPress
from cachepress.ranks import best, choose, pin
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class FinchPress(ScorerPress, alias="finch"):
    """Keeps the tokens that the question attends to, and the question's own tokens.

    Corallo and Papotti, "FINCH: Prompt-guided Key-Value Cache Compression" (TACL 2024,
    arXiv:2408.00167). The window is the question, however long it is: the pipeline reads context
    and question together and says where the question begins; elsewhere ``press(model,
    question=n)`` says so. Attention is averaged over the question's queries, each weighted by the
    number of tokens that it can see, and over the query heads of a KV head. Needs the question's
    queries, and the rotary embedding to rotate kept keys to positions without gaps. Best for one
    question on a context that is not needed again.

    Attributes:
        chunk_length: tokens of a chunk; the budget is spent evenly over the chunks. None for one.
        normalize_scores: whether queries are weighted.
        rerotate_keys: whether kept keys are rotated.
    """

    chunk_length: int | None = None
    normalize_scores: bool = True
    rerotate_keys: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_length is not None:
            check_count(self, "chunk_length")

    @property
    def needs(self) -> Needs:
        """The queries of the question."""
        return Needs(question=True, rotary=self.rerotate_keys, compaction=self.rerotate_keys)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by attention from the question, ``[B, H, T]``."""
        if view.queries is None or view.voters is None or view.n_question is None:
            raise TypeError("the view was made without the queries of a question")
        q = view.voters.shape[1]
        back = torch.arange(q, 0, -1, device=view.keys.device)
        votes = (view.voters & (back <= view.n_question[:, None])).float()  # [B, Q]
        votes = votes / votes.sum(-1, keepdim=True).clamp(min=1)
        if self.normalize_scores:
            held = view.valid.sum(-1).amax(-1, keepdim=True)  # [B, 1]
            votes = votes * (held + 1 - back).clamp(min=1)
        sums = attention_column_sums(view.queries, view.keys, view.valid, votes, view.rule)
        asked = view.index >= (view.n_seen - view.n_question)[:, None, None]
        scores = pin(sums.mean(2), asked)
        return scores if self.chunk_length is None else self._by_chunk(scores, view)

    def _by_chunk(self, scores: Tensor, view: LayerView) -> Tensor:
        """Lift the winners of each chunk above all other pairs."""
        assert self.chunk_length is not None
        winners, spent = torch.zeros_like(view.valid), torch.zeros_like(view.n_seen)
        for start in range(0, view.longest(), self.chunk_length):
            stop = (view.n_seen).clamp(max=start + self.chunk_length)
            share = (view.n_kept * stop).floor_divide(view.n_seen.clamp(min=1))
            inside = view.valid & (view.index >= start) & (view.index < stop[:, None, None])
            winners |= best(scores, inside, (share - spent).clamp(min=0)[:, None, None])
            spent = torch.maximum(share, spent)
        return choose(scores, winners)
