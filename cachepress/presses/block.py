"""Block-wise eviction: the budget holds after each block of the prompt."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.ops import known_counts, valid_last, wide_dtype
from cachepress.press import WrapperPress
from cachepress.presses._checks import counted
from cachepress.ranks import choose
from cachepress.view import LayerView


@dataclass(frozen=True)
class BlockPress(WrapperPress, alias="block"):
    """Evicts as if the prompt had come in blocks and been compressed after each.

    The way KeyDiff is meant for devices with little memory (Park et al., arXiv:2504.15364), but
    after the forward: attention was full. A token that one block evicts never comes back. For
    presses that need only keys, values and positions. Takes time that grows with the number of
    blocks times the tokens kept. Best for finding out what ``prefill_mode="online"`` would keep.

    Attributes:
        press: the press that scores.
        block_size: tokens of a block.
    """

    usual = "KeyDiffPress"
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "block_size")
        if replace(self.press.needs, rotary=False).observes or counted(self).scope == "model":
            raise CachepressError(
                f"BlockPress scores blocks by their keys, values and positions: {self.press!r} "
                "needs more; wrap for example KeyDiffPress or KnormPress, or use ChunkPress"
            )

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by the last block that held them, those kept above all, ``[B, H, T]``."""
        # One sequence after the other: what is kept so far is copied for each block.
        return torch.cat([self._score_one(view.sequence(b)) for b in range(len(view.n_seen))])

    def _score_one(self, view: LayerView) -> Tensor:
        (b, h, t), device = view.valid.shape, view.valid.device
        # One column more: scores of empty places are written there, and ignored.
        scores = view.keys.new_zeros((b, h, t + 1), dtype=wide_dtype(view.keys))
        held = view.index.new_zeros(b, h, 0, dtype=torch.long)
        valid = torch.zeros_like(held, dtype=torch.bool)
        longest = view.longest()
        size = min(self.block_size, max(longest, 1))
        edges = view.columns_from(torch.arange(0, longest + size, size, device=device))
        for i in range(edges.shape[-1] - 1):
            fresh = edges[..., i, None] + torch.arange(size, device=device)
            new = fresh < edges[..., i + 1, None]
            fresh = fresh.clamp(max=t - 1)
            held = torch.cat([held, fresh], dim=-1)
            valid = torch.cat([valid, new & view.valid.gather(-1, fresh)], dim=-1)
            if device.type == "cpu" and self.press.budget.holds_all(valid, view.n_kept):
                continue  # On a device it costs more to ask than to score.
            stop = (i + 1) * size
            order = valid_last(valid)[..., -max(known_counts(valid.sum(-1), min(stop, t))) :]
            held, valid = held.gather(-1, order), valid.gather(-1, order)
            part = replace(view.take(held), valid=valid, n_seen=view.n_seen.clamp(max=stop))
            score = self.press.score(part)
            scores.scatter_(-1, torch.where(valid, held, t), score.to(scores.dtype))
            valid = self.press.budget.select(score, valid, view.n_kept)
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask.scatter_(-1, torch.where(valid, held, t), valid)
        return choose(scores[..., :t], mask[..., :t])
