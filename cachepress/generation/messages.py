"""Contexts with pictures: messages of a chat, which a model's processor turns into its inputs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from cachepress.cache.codec import Codec
from cachepress.errors import CachepressError
from cachepress.generation.prefill import check_prefill
from cachepress.generation.prompt import Prompt, PromptOptions
from cachepress.hf import cache_argument, install_layers, text_decoder, trained_length
from cachepress.limits import shown
from cachepress.measure import Stopwatch
from cachepress.models.chat import encode
from cachepress.press import BasePress

_MARKER = "<<the question goes here>>"


@dataclass(frozen=True)
class Messages:
    """The messages of one chat, ``{"role": ..., "content": ...}`` each."""

    given: Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class PicturePrompt(Prompt):
    """Token ids of a context and its questions, and what the model is given of the context.

    Attributes:
        inputs: the arguments of the model's forward, with token ids and pictures.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)


def as_messages(inputs: object) -> object:
    """Tell the messages of a chat, or of each of several, from texts, which stay as they are."""
    if not isinstance(inputs, list | tuple) or not inputs:
        return inputs
    if all(isinstance(message, Mapping) and "role" in message for message in inputs):
        return Messages(inputs)
    return [as_messages(one) for one in inputs]


def picture_prompt(
    processor: object,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    messages: Messages,
    options: PromptOptions,
) -> PicturePrompt:
    """Turn messages into a model's inputs; the questions follow the last message's content.

    Args:
        processor: the model's processor.
        tokenizer: its tokenizer.
        model: the model.
        messages: the messages, the last one of the user.
        options: the questions; a context with pictures is not cut.

    Raises:
        CachepressError: if there is no processor, no question, a picture that is not given as one,
            or no room.
    """
    if processor is None:
        raise CachepressError(
            "got messages and no processor, which turns them into the model's inputs: give "
            "pipeline(..., processor=AutoProcessor.from_pretrained(...))"
        )
    before, after = _around_question(processor, messages)
    images = [_image(part) for part in _parts(messages) if part.get("type") == "image"]
    process = cast(Callable[..., Mapping[str, Tensor]], processor)
    found = process(text=[before], images=images or None, return_tensors="pt")
    inputs = {name: x for name, x in found.items() if isinstance(x, Tensor)}
    question_ids = [
        encode(tokenizer, asked + after + prefix, special=False)
        for asked, prefix in zip(options.asked, options.prefixes, strict=True)
    ]
    if not all(ids.shape[1] for ids in question_ids):
        raise CachepressError("messages: got no question, wanted question= or questions=")
    prompt = PicturePrompt(inputs["input_ids"].cpu(), question_ids, inputs=inputs)
    _check_room(model, prompt, options)
    return prompt


def read_pictures(
    model: PreTrainedModel,
    prompt: PicturePrompt,
    press: BasePress | None,
    cache: Cache | None,
    *,
    chunk_size: int | None,
    storage: str | Codec,
    offload: bool,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[Cache, float]:
    """Read a context with pictures in one forward, and compress it.

    Returns:
        The cache, and the seconds that it took.

    Raises:
        CachepressError: if it was to be read in chunks, or after something else.
    """
    if chunk_size is not None:
        raise CachepressError(
            f"prefill_chunk_size: got {chunk_size}, but messages are read in one forward: leave it "
            "out"
        )
    if press is not None and press.needs.question:
        raise CachepressError(f"{press!r} observes the question: it does not go with messages")
    check_prefill(press, None, "exact", storage, offload)
    cache = DynamicCache(config=text_decoder(model).config) if cache is None else cache
    if cache.get_seq_length():
        raise CachepressError("cache: got one that holds a text, wanted an empty one for messages")
    given: dict[str, object] = {
        name: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype)
        for name, x in prompt.inputs.items()
    }
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = 1
    acting = nullcontext()
    if press is not None:
        acting = press(model, storage=storage, tokenizer=tokenizer)
    if offload:
        install_layers(cache, model, offload)
    with Stopwatch(model.device) as stopwatch, torch.no_grad(), acting:
        model(**given, use_cache=True, **{cache_argument(model): cache})
    return cache, stopwatch.seconds


def _around_question(processor: object, messages: Messages) -> tuple[str, str]:
    """Return what the chat template makes of what is before a question, and after it."""
    *earlier, last = messages.given
    if last.get("role") != "user":
        raise CachepressError(f"messages: got a last one of {shown(last.get('role'))}, wanted user")
    asked = {**last, "content": [*_content(last), {"type": "text", "text": _MARKER}]}
    lay_out = cast(Callable[..., str], getattr(processor, "apply_chat_template"))  # noqa: B009
    text = lay_out([*earlier, asked], add_generation_prompt=True, tokenize=False)
    before, found, after = text.partition(_MARKER)
    if not found:
        raise CachepressError("the processor's chat template drops the user's message")
    return before, after


def _parts(messages: Messages) -> list[Mapping[str, object]]:
    return [part for message in messages.given for part in _content(message)]


def _content(message: Mapping[str, object]) -> list[Mapping[str, object]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(cast(Sequence[Mapping[str, object]], content or ()))


def _image(part: Mapping[str, object]) -> object:
    if "image" not in part:
        raise CachepressError(
            f"messages: got an image by {shown(sorted(part))}, wanted the picture itself under "
            "'image'"
        )
    return part["image"]


def _check_room(model: PreTrainedModel, prompt: PicturePrompt, options: PromptOptions) -> None:
    n = prompt.context_ids.shape[1]
    each = zip(prompt.question_ids, options.limits, strict=True)
    needed = n + max(ids.shape[1] + limit for ids, limit in each)
    most = trained_length(model)
    if most is not None and needed > most and not options.beyond_trained_length:
        raise CachepressError(
            f"the messages have {n} tokens, and {needed} with question and answer, where the model "
            f"has {most} positions: shorten them"
        )
