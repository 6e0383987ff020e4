"""Block: the text is read block by block, and the budget holds after each."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.budgets import choose
from cachepress.errors import CachepressError
from cachepress.ops import valid_last, wide_dtype
from cachepress.presses.base import WrapperPress, check_count, counted
from cachepress.view import LayerView


@dataclass(frozen=True)
class BlockPress(WrapperPress, alias="block"):
    """Chooses as if the text had come in blocks, each of which was compressed on arrival.

    The way KeyDiff is meant for devices with little memory (Park et al., arXiv:2504.15364), but
    after the fact: attention was full. Rows that lost once never come back. For presses that need
    only keys, values and positions. Best for finding out what ``prefill_mode="online"`` would keep.

    Attributes:
        press: the press that scores.
        block_size: tokens of a block.
    """

    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "block_size")
        if self.press.needs.watches or counted(self).scope == "model":
            raise CachepressError(
                f"BlockPress scores blocks by their keys, values and positions: {self.press!r} "
                "needs more; wrap for example KeyDiffPress or KnormPress, or use ChunkPress"
            )

    def score(self, view: LayerView) -> Tensor:
        """The last block's scores, those that are left above all other rows, ``[B, H, T]``."""
        scores = torch.zeros_like(view.valid, dtype=wide_dtype(view.keys))
        left = torch.zeros_like(view.valid)
        for start in range(0, int(view.n_seen.max()), self.block_size):
            stop = start + self.block_size
            fresh = (view.index >= start) & (view.index < stop) & view.valid
            candidates = left | fresh
            longest = int(candidates.sum(-1).max())
            if not longest:
                continue
            order = valid_last(candidates)[..., -longest:]
            table = view.only(candidates).take(order)
            table = replace(table, n_seen=view.n_seen.clamp(max=stop))
            score = self.press.score(table)
            mask = self.press.budget.select(score, table.valid, view.n_kept)
            scores = scores.scatter(-1, order, score.to(scores.dtype))
            left = torch.zeros_like(left).scatter(-1, order, mask)
        return choose(scores, left)
