"""ChunkKV: whole chunks of the text are kept or evicted."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.ops import wide
from cachepress.press import WrapperPress
from cachepress.presses._checks import check_by_layer, counted
from cachepress.ranks import best, choose, pinned
from cachepress.view import LayerView


@dataclass(frozen=True)
class ChunkKVPress(WrapperPress, alias="chunkkv"):
    """Keeps whole chunks of the text, those with the highest mean score, in all heads alike.

    Liu et al., "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM
    Inference" (arXiv:2502.00299). A chunk's score is the mean over its tokens in all heads of the
    layer. The budget is exact: of the last chunk the best tokens stay, by their mean over the
    heads. Tokens that the inner press pins stay before all others and do not count in their chunk.
    Where heads have budgets of their own (AdaKV inside), each goes as far down the same ranking as
    its budget reaches. Needs what the inner press needs.
    Best for scores that jump from token to token, in texts whose sense lies in phrases.

    Attributes:
        press: the press that scores.
        chunk_length: tokens of a chunk.
    """

    chunk_length: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "chunk_length")
        counted(self)
        check_by_layer(self)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by minus their token's rank, those kept above all others, ``[B, H, T]``."""
        scores = wide(self.press.score(view))
        budgets = counted(self).select(scores, view.valid, view.n_kept).sum(-1, keepdim=True)
        chunks = Chunks.of(scores, view, self.chunk_length)
        ranks = inverse_order(_by_group(self.groups(chunks), chunks.tokens))  # [B, C * L]
        # One ranking of the text for all heads, looked up by each pair's index: heads that evicted
        # tokens before hold different ones in the same place.
        column = view.index.long().clamp(0, ranks.shape[-1] - 1)
        ranked = -ranks[:, None].expand(-1, column.shape[1], -1).gather(-1, column).float()
        ranked = torch.where(pinned(scores), scores, ranked)
        return choose(ranked, best(ranked, view.valid, budgets))

    def groups(self, chunks: "Chunks") -> Tensor:
        """Number the group of each token, ``[B, C, L]``: the lowest number is kept first.

        Here a chunk is a group, numbered by its rank. Within a group tokens are kept by their own
        score.
        """
        return inverse_order(highest_first(chunks.means)).unsqueeze(-1).expand_as(chunks.tokens)


@dataclass(frozen=True)
class Chunks:
    """Scores by index in the text: ``C`` chunks of ``L`` tokens; pinned tokens are left out.

    Attributes:
        tokens: ``[B, C, L]`` mean over the heads that hold the token; minus infinity for none.
        means: ``[B, C]`` mean over the pairs of the chunk in all heads; minus infinity for none.
    """

    tokens: Tensor
    means: Tensor

    @classmethod
    def of(cls, scores: Tensor, view: LayerView, length: int) -> "Chunks":
        """Group ``scores [B, H, T]`` by chunk."""
        free = view.valid & ~pinned(scores)
        longest = view.longest()
        length = min(length, max(longest, 1))
        size = -(-longest // length) * length
        column = view.index.long().masked_fill(~free, size)

        def by_index(x: Tensor) -> Tensor:
            # In doubles, so that chunks of equal scores are equal however a sum is ordered.
            text = x.new_zeros(*x.shape[:2], size + 1, dtype=torch.double)
            return text.scatter(-1, column, x.double())[..., :-1].unflatten(-1, (-1, length))

        totals, counts = by_index(scores).sum(1), by_index(free).sum(1)
        means = _mean(totals, counts), _mean(totals.sum(-1), counts.sum(-1))
        return cls(*(x.to(scores.dtype) for x in means))


def _mean(totals: Tensor, counts: Tensor) -> Tensor:
    return (totals / counts).masked_fill(counts == 0, float("-inf"))


def highest_first(x: Tensor) -> Tensor:
    """Sort the last axis from the highest number down; of equal ones the newest comes first."""
    return x.shape[-1] - 1 - x.flip(-1).argsort(dim=-1, descending=True, stable=True)


def _by_group(groups: Tensor, x: Tensor) -> Tensor:
    """Sort ``[B, C * L]`` by group, and from the highest number down within a group."""
    # Two stable sorts: the second keeps the order of the first within each group.
    order = highest_first(x.flatten(1))
    grouped = groups.flatten(1).gather(-1, order).argsort(dim=-1, stable=True)
    return order.gather(-1, grouped)


def inverse_order(order: Tensor) -> Tensor:
    """Invert a permutation of the last axis: the rank of each entry."""
    count = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, count)
