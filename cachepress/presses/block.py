"""Block: the text is read block by block, and the budget holds after each."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.ops import valid_last, wide_dtype
from cachepress.press import WrapperPress
from cachepress.presses._checks import counted
from cachepress.ranks import choose
from cachepress.view import LayerView


@dataclass(frozen=True)
class BlockPress(WrapperPress, alias="block"):
    """Chooses as if the text had come in blocks, each of which was compressed on arrival.

    The way KeyDiff is meant for devices with little memory (Park et al., arXiv:2504.15364), but
    after the fact: attention was full. Rows that lost once never come back. For presses that need
    only keys, values and positions. Takes time that grows with the number of blocks times the rows
    that stay. Best for finding out what ``prefill_mode="online"`` would keep.

    Attributes:
        press: the press that scores.
        block_size: tokens of a block.
    """

    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "block_size")
        if self.press.needs.observes or counted(self).scope == "model":
            raise CachepressError(
                f"BlockPress scores blocks by their keys, values and positions: {self.press!r} "
                "needs more; wrap for example KeyDiffPress or KnormPress, or use ChunkPress"
            )

    def score(self, view: LayerView) -> Tensor:
        """The last block's scores, those that are left above all other rows, ``[B, H, T]``."""
        (b, h, t), device = view.valid.shape, view.valid.device
        # One column more, for what is scored in the place of a row that is not there.
        scores = view.keys.new_zeros((b, h, t + 1), dtype=wide_dtype(view.keys))
        left = view.index.new_zeros(b, h, 0, dtype=torch.long)
        there = torch.zeros_like(left, dtype=torch.bool)
        seen = int(view.n_seen.max())
        size = min(self.block_size, max(seen, 1))
        starts = torch.arange(0, seen + size, size)
        edges = view.columns_from(starts.to(device))
        for i, stop in enumerate(starts.tolist()[1:]):
            fresh = edges[..., i, None] + torch.arange(size, device=device)
            new = fresh < edges[..., i + 1, None]
            fresh = fresh.clamp(max=t - 1)
            left = torch.cat([left, fresh], dim=-1)
            there = torch.cat([there, new & view.valid.gather(-1, fresh)], dim=-1)
            if self.press.budget.holds_all(there, view.n_kept):
                continue
            order = valid_last(there)[..., -int(there.sum(-1).max()) :]
            left, there = left.gather(-1, order), there.gather(-1, order)
            table = view.take(left)
            table = replace(table, valid=there, n_seen=view.n_seen.clamp(max=stop))
            score = self.press.score(table)
            scores.scatter_(-1, torch.where(there, left, t), score.to(scores.dtype))
            there = self.press.budget.select(score, there, view.n_kept)
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask.scatter_(-1, torch.where(there, left, t), there)
        return choose(scores[..., :t], mask[..., :t])
