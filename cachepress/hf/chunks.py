"""Makes the token ids that let a model repeat its context, chunk by chunk.

Running them through the model is in ``cachepress.hf.reconstruction``.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cachepress.errors import CachepressError
from cachepress.models.chat import encode, template
from cachepress.press import BasePress
from cachepress.reconstruction import Reconstruction

_LEAD = 8
"""Tokens of the chunk before that tell the model where to go on."""


class Chunk(NamedTuple):
    """A part ``[start, stop)`` of a sequence, and the token ids ``[1, n]`` that repeat it.

    The first ``opening`` tokens of the sequence are not repeated.
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
    """Divide one sequence ``[1, T]`` of token ids into chunks, after its ``opening`` tokens."""
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
    """Count the tokens of a text ``[1, T]`` that the chat template put before the context.

    A system prompt that the template adds by itself is among them. 0 where the text was made
    without the template. The last of these tokens may differ from that of the template alone,
    because a token may span its end and the beginning of the context.
    """
    if tokenizer is None or not tokenizer.chat_template:
        return 0
    before = encode(tokenizer, template(tokenizer, False)[0], special=False)[0].tolist()
    given, bos = ids[0].tolist(), tokenizer.bos_token_id
    start = int(given[:1] == [bos] and before[:1] != [bos])
    pairs = zip(before, given[start:], strict=False)
    alike = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(given)))
    return start + alike if alike and alike >= len(before) - 1 else 0


def tokenizer_for(
    press: BasePress, model: PreTrainedModel, given: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that was given, or the one saved with a model if a press needs one.

    Raises:
        CachepressError: if it needs one and there is none.
    """
    reconstruction = press.needs.reconstruction
    if given is not None or reconstruction is None or not reconstruction.speaks:
        return given
    name = model.config.name_or_path
    try:
        return _load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise CachepressError(
            f"context reconstruction asks the model in words, and {name!r} has no tokenizer: "
            "give press(model, tokenizer=tokenizer), or use the pipeline"
        ) from error


@lru_cache
def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
