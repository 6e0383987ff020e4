"""Chunk-wise compression: the budget is spent evenly along the text."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.ops import wide_dtype
from cachepress.press import WrapperPress
from cachepress.presses._checks import check_by_layer
from cachepress.ranks import choose
from cachepress.view import EVERY, LayerView, Needs


@dataclass(frozen=True)
class ChunkPress(WrapperPress, alias="chunk"):
    """Compresses each chunk of the text by itself, with its share of the budget.

    The budget is shared out in proportion to the chunks' lengths, and exact in total. A press that
    needs queries gets those of the chunk; chunks of an earlier prompt, whose queries are gone,
    are scored by the queries of this one. Needs what the inner press needs, for all queries. Best
    for contexts of many parts that are all asked about.

    Attributes:
        press: the press that scores.
        chunk_length: tokens of a chunk.
    """

    chunk_length: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "chunk_length")
        check_by_layer(self)

    @property
    def needs(self) -> Needs:
        """What the inner press needs, with the queries of every chunk."""
        needs = self.press.needs
        return replace(needs, queries=EVERY) if needs.queries else needs

    def score(self, view: LayerView) -> Tensor:
        """Score each chunk by the inner press, its winners above all other pairs, ``[B, H, T]``."""
        return torch.cat([self._score_one(view.sequence(b)) for b in range(len(view.n_seen))])

    def _score_one(self, view: LayerView) -> Tensor:
        """Score one sequence, ``[1, H, T]``."""
        seen, kept, spent = int(view.n_seen), int(view.n_kept), 0
        scores = torch.zeros_like(view.valid, dtype=wide_dtype(view.keys))
        winners, whole = torch.zeros_like(view.valid), None
        starts = range(0, seen, self.chunk_length)
        edges = view.columns_from(torch.tensor([*starts, seen], device=view.index.device))[0]
        firsts, lasts = edges[:, :-1].amin(0).tolist(), edges[:, 1:].amax(0).tolist()
        for start, first, last in zip(starts, firsts, lasts, strict=True):
            stop = min(start + self.chunk_length, seen)
            # The whole budget up to here, less what was spent: exact in total, however it rounds.
            quota = kept * stop // seen - spent
            spent += quota
            if first >= last:
                continue
            part = slice(first, last)
            chunk = _alone(view, part, start, stop, quota)
            voters = chunk.voters if self.press.needs.queries else None
            if voters is not None and not bool(voters.any()):
                # A chunk of an earlier prompt: its own queries are gone, the newest ones stand in.
                whole = self.press.score(view) if whole is None else whole
                score = whole[..., part]
            else:
                score = self.press.score(chunk)
            scores[..., part] = torch.where(chunk.valid, score, scores[..., part])
            winners[..., part] |= self.press.budget.select(score, chunk.valid, chunk.n_kept)
        return choose(scores, winners)


def _alone(view: LayerView, part: slice, start: int, stop: int, quota: int) -> LayerView:
    """View a chunk as a text of its own."""
    chunk = view[part]
    chunk = chunk.only((chunk.index >= start) & (chunk.index < stop))
    return replace(
        chunk,
        index=chunk.index - start,
        n_seen=torch.full_like(view.n_seen, stop - start),
        n_kept=torch.full_like(view.n_kept, quota),
    )
