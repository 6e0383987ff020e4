"""Entropy-gated ChunkKV: a chunk whose score comes from a few tokens keeps only those."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.presses.chunkkv import ChunkKVPress, Chunks, highest_first, inverse_order


@dataclass(frozen=True)
class EntropyGatedChunkKVPress(ChunkKVPress, alias="entropy_gated_chunkkv"):
    """Keeps whole chunks as ChunkKV does, but only the best tokens where a few make the score.

    Builds on Liu et al. (arXiv:2502.00299). A chunk is cut when its mean score is at least the
    median of the chunks and its entropy is below the median (of an even number the lower one of
    the two in the middle). The entropy is that of the tokens' shares in the chunk's score,
    divided by the entropy of equal shares; that of a chunk of one token is 0. Where scores fall
    below zero, all of the text is first lifted by the same amount, to zero. Tokens that the inner
    press pins do not count. What is freed goes to further chunks, then to the best of the tokens
    that were cut. Needs what the inner press needs.
    Best for attention scores at small budgets, where single tokens outshine their chunk.

    Attributes:
        press: the press that scores.
        chunk_length: tokens of a chunk.
        low_entropy_chunk_length: tokens that are kept of a chunk that is cut.
    """

    chunk_length: int = 10
    low_entropy_chunk_length: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "low_entropy_chunk_length")
        if self.low_entropy_chunk_length >= self.chunk_length:
            raise CachepressError(
                f"low_entropy_chunk_length: got {self.low_entropy_chunk_length}, wanted fewer than "
                f"the {self.chunk_length} tokens of a chunk"
            )

    def groups(self, chunks: Chunks) -> Tensor:
        """Number the group of each token, ``[B, C, L]``: tokens that are cut come last."""
        whole = super().groups(chunks)
        rank = inverse_order(highest_first(chunks.tokens))
        cut = _low_entropy(chunks).unsqueeze(-1) & (rank >= self.low_entropy_chunk_length)
        return whole.masked_fill(cut, chunks.means.shape[-1])


def _low_entropy(chunks: Chunks) -> Tensor:
    """Find the chunks with a good mean score and a low entropy, ``[B, C]``."""
    held = chunks.means > float("-inf")
    entropy = _entropy(chunks.tokens).masked_fill(~held, float("nan"))
    means = chunks.means.masked_fill(~held, float("nan"))
    good = means >= means.nanmedian(-1, keepdim=True).values
    return good & (entropy < entropy.nanmedian(-1, keepdim=True).values)


def _entropy(tokens: Tensor) -> Tensor:
    """Entropy of the shares in each chunk's score, 0 for a single token to 1 for equal shares."""
    held = tokens > float("-inf")
    lowest = tokens.masked_fill(~held, float("inf")).amin((1, 2), keepdim=True).clamp(max=0)
    lifted = (tokens.double() - lowest).masked_fill(~held, 0)
    total, n = lifted.sum(-1), held.sum(-1)
    shares = lifted / total.unsqueeze(-1)
    entropy = torch.special.entr(shares).sum(-1) / n.double().log()
    # In floats, so that chunks with the same shares are equal however a sum is ordered.
    return entropy.masked_fill(total == 0, 1).masked_fill(n < 2, 0).float()
