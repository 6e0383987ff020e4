"""Applies a tokenizer's chat template, and encodes text as token ids."""

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cachepress.errors import CachepressError

_MARKER = "<<the context goes here>>"


def template(tokenizer: PreTrainedTokenizerBase, enable_thinking: bool) -> tuple[str, str]:
    """Return what the chat template puts before a context and after a question."""
    if not tokenizer.chat_template:
        return "", ""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARKER}],
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=enable_thinking,
    )
    before, found, after = cast(str, text).partition(_MARKER)
    if not found:
        raise CachepressError("the tokenizer's chat template drops the user's message")
    return before, after


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> Tensor:
    """Encode a text as token ids ``[1, n]``, with or without the tokenizer's special tokens."""
    ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    return torch.tensor([ids], dtype=torch.long)
