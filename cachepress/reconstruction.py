"""Replay: the model is made to repeat its context, to see which rows it reads for that."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cachepress.chat import encode, template
from cachepress.errors import CachepressError
from cachepress.ops import AttentionRule, wide

_BLOCK = 1024
_LEAD = 8
"""Tokens of the chunk before that tell the model where to go on."""


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


class Chunk(NamedTuple):
    """A part ``[start, stop)`` of a sequence, and the token ids ``[1, n]`` that repeat it.

    Of the sequence the first ``opening`` tokens are not repeated.
    """

    start: int
    stop: int
    ids: Tensor
    opening: int


def chunks(
    reconstruction: Reconstruction,
    ids: Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    opening: int = 0,
) -> Iterator[Chunk]:
    """The chunks of one sequence ``[1, T]`` of token ids, after its first ``opening`` tokens."""
    first = later = after = ids[:, :0]
    if reconstruction.speaks and tokenizer is not None:
        after = encode(tokenizer, template(tokenizer, False)[1], special=False).to(ids)
        first, later = (
            encode(tokenizer, text, special=False).to(ids)
            for text in (reconstruction.first, reconstruction.later)
        )
    for start in range(opening, ids.shape[1], reconstruction.chunk_size):
        stop = min(start + reconstruction.chunk_size, ids.shape[1])
        asked = [first] if start == opening else [later, ids[:, max(0, start - _LEAD) : start]]
        asked = asked if reconstruction.speaks else []
        repeated = torch.cat([*asked, after, ids[:, start:stop]], dim=1)
        yield Chunk(start, stop, repeated, opening)


def opening_of(ids: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """How many of the first tokens of a text ``[1, T]`` the chat template put before the context.

    A system prompt that the template writes by itself is among them. None where the text was made
    without the template. The last of these tokens may be another one than in the template alone,
    because it goes on into the context.
    """
    if tokenizer is None or not tokenizer.chat_template:
        return 0
    before = encode(tokenizer, template(tokenizer, False)[0], special=False)[0].tolist()
    given, bos = ids[0].tolist(), tokenizer.bos_token_id
    start = int(given[:1] == [bos] and before[:1] != [bos])
    pairs = zip(before, given[start:], strict=False)
    alike = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(given)))
    return start + alike if alike and alike >= len(before) - 1 else 0


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that lies where a model came from.

    Raises:
        CachepressError: if there is none.
    """
    name = model.config.name_or_path
    try:
        return _load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise CachepressError(
            f"a replay asks the model in words, and there is no tokenizer at {name!r}: give "
            "press(model, tokenizer=tokenizer), or use the pipeline"
        ) from error


@lru_cache
def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
