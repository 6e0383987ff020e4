"""Context reconstruction: what a press declares and sees when the model repeats its context.

How the model is made to repeat it is in ``cachepress.hf.reconstruction``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.ops import AttentionRule, wide

_BLOCK = 1024


@dataclass(frozen=True)
class Reconstruction:
    """What a press wants the model to repeat when a prompt was read.

    Attributes:
        chunk_size: tokens of the context that are repeated in one forward.
        n_sink: first rows of the text, which the repeating queries see besides the chunk's; where
            the chat template put more tokens before the context, those.
        first: what asks for the first chunk; nothing is asked where it is empty.
        later: what asks for each further chunk, followed by the last tokens of the one before.
        weighs: whether the output projection and the hidden states are looked at.
        gradient: whether the gradient of the last hidden states is looked at.
        whole: whether the text is repeated in one go behind itself, each chunk after those before,
            and every query is seen with all rows; else each chunk is repeated by itself.
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
    """What one layer showed while one sequence's chunk was repeated.

    The rows are the sinks that stand before the chunk, the chunk's, and those of the replay itself;
    the queries are those of the replay, the last ``n`` rows. In a whole replay the rows are all
    that there are, and the chunk is all of the text.

    Attributes:
        queries: ``[1, H, G, n, D]``.
        keys: ``[1, H, N, D]``.
        values: ``[1, H, N, E]``.
        valid: ``[1, H, N]`` bool, which rows there are.
        chunk: which of the rows are the chunk's.
        rule: how the layer turns products into weights.
        projection: ``[H, G, E, M]`` the output projection, or None.
        hidden: ``[1, n, M]`` the hidden states that attention read, or None.
        gradient: ``[1, n]`` norm of the gradient of the summed squares of the last hidden states
            with respect to what attention added, or None.
        before: what the press made of the chunks before, in a whole replay; else None.
        last: whether no other chunk follows that the press has to add to this one.
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
        """L2 norm of what each of the chunk's values adds to the output, ``[1, H, G, chunk]``."""
        assert self.projection is not None
        norms = []
        for values in self.values[:, :, self.chunk].split(_BLOCK, dim=2):
            added = wide(values.unsqueeze(2)) @ wide(self.projection)  # [1, H, G, block, M]
            norms.append(added.norm(dim=-1))
        return torch.cat(norms, dim=-1)
