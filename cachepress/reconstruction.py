"""Context reconstruction (KVzip): scores from the attention of a model that repeats its context.

Here is what a press declares of it and what it is given; how the model is made to repeat the
context is in ``cachepress.hf.reconstruction``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.ops import AttentionRule, by_token, quadratic_forms, wide_dtype

_AT_ONCE = 512
"""Channels of the layer's output that are summed up at once."""


@dataclass(frozen=True)
class Reconstruction:
    """Declares how the model repeats its context after it read a prompt.

    Attributes:
        chunk_size: tokens of the context that are repeated in one forward.
        n_sink: first tokens of the text, whose pairs a press is given besides the chunk's; where
            the chat template put more tokens before the context, all of those.
        first: the words that ask for the first chunk; where they are empty, none are said.
        later: the words that ask for each further chunk; the last tokens of the one before follow.
        weighs: whether the press needs the output projection and the hidden states.
        gradient: whether the press needs the gradient of the last hidden states.
        whole: whether the text is repeated in one go, each chunk after those before, and the press
            is given all pairs; else each chunk is repeated by itself, behind the text.
    """

    chunk_size: int
    n_sink: int
    first: str
    later: str
    weighs: bool = False
    gradient: bool = False
    whole: bool = False

    @property
    def speaks(self) -> bool:
        """Whether the model is asked in words, for which a tokenizer is needed."""
        return bool(self.first or self.later)


@dataclass(frozen=True)
class ReconstructionView:
    """Queries and pairs of one layer while one sequence's chunk is repeated.

    The ``N`` pairs are those of the sinks before the chunk, of the chunk, and of the ``n`` tokens
    that repeat it; the queries are those of these ``n`` tokens. In a ``whole`` reconstruction the
    pairs are all that there are, and the chunk is all of the text.

    Attributes:
        queries: ``[1, H, G, n, D]``.
        keys: ``[1, H, N, D]``.
        values: ``[1, H, N, E]``.
        valid: ``[1, H, N]`` bool; False for padding and for places where a head holds no pair.
        chunk: which of the pairs are the chunk's.
        rule: how the layer turns query-key products into attention weights.
        projection: ``[H, G, E, M]`` the output projection, or None.
        hidden: ``[1, n, M]`` the hidden states that attention was given, or None.
        gradient: ``[1, n]`` norm of the gradient of the summed squares of the last hidden states
            with respect to the attention module's output, or None.
        before: what ``BasePress.reconstructed`` returned for the chunks before, in a ``whole``
            reconstruction; else None.
        last: whether no other chunk follows.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    valid: Tensor
    chunk: slice
    rule: AttentionRule
    projection: Tensor | None = None
    hidden: Tensor | None = None
    gradient: Tensor | None = None
    before: Tensor | None = None
    last: bool = True

    def value_norms(self) -> Tensor:
        """Compute the L2 norms of the chunk's values after projection, ``[1, H, G, chunk]``."""
        assert self.projection is not None
        h, g, e, _ = self.projection.shape
        # |v W|^2 is v (W W') v': the values need not be projected to all channels of the output. In
        # doubles, because a norm that is far below that of v is the difference of large numbers.
        gram = torch.zeros(h, g, e, e, dtype=torch.double, device=self.values.device)
        for part in self.projection.split(_AT_ONCE, dim=-1):
            gram += part.double() @ part.double().mT
        each, dtype = 2 * h * g * e, wide_dtype(self.values)

        def norms(values: Tensor) -> Tensor:
            return quadratic_forms(values.double(), gram[None]).clamp(min=0).sqrt().to(dtype)

        return by_token(norms, self.values[:, :, self.chunk], each=each)
