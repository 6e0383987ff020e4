"""Decodes answers after what a cache holds, or scores given texts by teacher forcing."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from cachepress.errors import CachepressError
from cachepress.hf import cache_argument
from cachepress.limits import said, shown
from cachepress.ops import wide

_ONE_ANSWER: Mapping[str, object] = {
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "use_cache": True,
}
"""Given in every call, since options that are not come from the model's own generation config."""
_FIXED = {
    "max_new_tokens": (),
    "cache_implementation": (None,),
    "prefill_chunk_size": (None,),
    **{name: (None, value) for name, value in _ONE_ANSWER.items()},
}
"""Options of transformers that do not fit an answer from a cache, with the values that they may
have."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache,
    question_ids: Sequence[Tensor],
    max_new_tokens: int,
    generation: Mapping[str, object],
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Generate answers to a batch of questions, as token ids up to their end token.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        cache: a cache for the batch, which is continued.
        question_ids: ``[1, q]`` for each sequence; shorter ones are padded on the left.
        max_new_tokens: most tokens of an answer.
        generation: options of transformers' ``GenerationConfig``.
        streamer: gets the tokens as they come, those of the question first.

    Raises:
        CachepressError: if transformers refuses the options, or they do not fit one answer from a
            cache.
    """
    check_generation(generation)
    try:
        return _generate(
            model, tokenizer, cache, question_ids, max_new_tokens, generation, streamer
        )
    except CachepressError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        if not generation:
            raise
        raise CachepressError(
            f"generation options {shown(dict(generation))}: {said(error)}"
        ) from error


def check_generation(generation: Mapping[str, object]) -> None:
    """Check options of transformers' ``GenerationConfig``.

    Raises:
        CachepressError: if one is unknown, or would give no answer, several, or one without the
            cache.
    """
    if not isinstance(generation, Mapping):
        raise CachepressError(
            f"generation: got {shown(generation)}, wanted a mapping of options of GenerationConfig"
        )
    known = GenerationConfig().to_dict()
    for name, value in generation.items():
        if name not in known:
            raise CachepressError(f"generation: {shown(name)} is no option of GenerationConfig")
        if name in _FIXED and not any(value is same for same in _FIXED[name]):
            raise CachepressError(
                f"generation: {name}={shown(value)} does not go here, where each question gets one "
                "answer from its cache: leave it out"
            )


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache,
    question_ids: Sequence[Tensor],
    max_new_tokens: int,
    generation: Mapping[str, object],
    streamer: BaseStreamer | None,
) -> list[list[int]]:
    ends = end_tokens(model, tokenizer, generation)
    pad = tokenizer.pad_token_id
    pad = pad if isinstance(pad, int) else (ends or [0])[0]
    ids, mask = _padded(question_ids, cache.get_seq_length(), pad)
    options = {"do_sample": False, "pad_token_id": pad, **generation, **_ONE_ANSWER}
    config = _FromCache(**{**options, "eos_token_id": ends or None}, max_new_tokens=max_new_tokens)
    stops = generation.get("stop_strings")
    with torch.no_grad():
        out = cast(Callable[..., Tensor], model.generate)(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            tokenizer=tokenizer if stops else None,
            streamer=streamer,
            **{cache_argument(model): cache},
        )
    return [_until(answer, ends) for answer in out[:, ids.shape[1] :].tolist()]


class _FromCache(GenerationConfig):
    """Generation options for an answer from a cache that is given.

    They never name a kind of cache for ``generate`` to make. The model's own generation config may,
    and transformers takes its value wherever an option is None; so setting it has no effect here.
    """

    @property
    def cache_implementation(self) -> None:
        """Return None: no kind of cache."""
        return None

    @cache_implementation.setter
    def cache_implementation(self, value: str | None) -> None: ...


class Forced(NamedTuple):
    """A given answer whose tokens are scored instead of generated (teacher forcing).

    Attributes:
        question_ids: ``[1, q]`` the token ids that it follows.
        answer: its token ids.
    """

    question_ids: Tensor
    answer: Sequence[int]


def force(model: PreTrainedModel, cache: Cache, texts: Sequence[Forced]) -> list[Tensor]:
    """Compute log-probabilities at each token of given answers, and after the last one.

    Args:
        model: the model.
        cache: a cache for the batch, which is continued.
        texts: one for each sequence.

    Returns:
        For each text, log-probabilities ``[len(answer) + 1, vocabulary]``, at least float32.
    """
    whole = [
        torch.cat([text.question_ids, torch.tensor([list(text.answer)], dtype=torch.long)], dim=1)
        for text in texts
    ]
    ids, mask = _padded(whole, cache.get_seq_length(), 0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    most = max(len(text.answer) for text in texts) + 1
    with torch.no_grad():
        logits = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=positions.to(model.device),
            logits_to_keep=most,
            use_cache=True,
            **{cache_argument(model): cache},
        ).logits
    # log_softmax copies what is needed: a view would hold the logits of padding too.
    return [
        wide(own[most - len(text.answer) - 1 :]).log_softmax(-1)
        for own, text in zip(logits, texts, strict=True)
    ]


def end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation: Mapping[str, object]
) -> list[int]:
    """Find the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    ends = generation.get("eos_token_id", ends)
    if ends is None:
        return []
    return cast(list[int], list(ends) if isinstance(ends, list | tuple) else [ends])


def _padded(texts: Sequence[Tensor], seen: int, pad: int) -> tuple[Tensor, Tensor]:
    """Batch texts ``[1, q]``, padded on the left, with a mask over all text columns.

    The mask covers what the cache has ``seen`` as well, evicted tokens included.
    """
    longest = max(ids.shape[1] for ids in texts)
    ids = torch.full((len(texts), longest), pad)
    mask = torch.ones(len(texts), seen + longest, dtype=torch.long)
    for i, text in enumerate(texts):
        padding = longest - text.shape[1]
        ids[i, padding:] = text[0]
        mask[i, seen : seen + padding] = 0
    return ids, mask


def _until(tokens: list[int], ends: list[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[:i]
    return tokens
