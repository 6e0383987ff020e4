"""Decodes answers after what a cache holds, or scores given texts by teacher forcing."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer
from transformers.utils.generic import ModelOutput

from cachepress.errors import CachepressError
from cachepress.generation.options import check_generation, looks_up, text_reader
from cachepress.hf import cache_argument, check_continues, shift_of, use_shift
from cachepress.limits import is_out_of_memory, said, shown
from cachepress.ops import wide

_USUAL: Mapping[str, object] = {"num_return_sequences": 1, "return_dict_in_generate": False}
"""Given in every call, since options that are not come from the model's own generation config."""
_REFUSALS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What transformers raises for options that it cannot take."""


class Generated(NamedTuple):
    """Answers to a batch of questions.

    Attributes:
        tokens: token ids of each answer up to its end token; question after question, with as many
            answers each as ``num_return_sequences`` says.
        output: what transformers' ``generate`` returned, with ``return_dict_in_generate``.
    """

    tokens: list[list[int]]
    output: ModelOutput | None = None


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache,
    question_ids: Sequence[Tensor],
    max_new_tokens: int,
    generation: Mapping[str, object],
    streamer: BaseStreamer | None = None,
    text_ids: Tensor | None = None,
) -> Generated:
    """Generate answers to a batch of questions.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        cache: a cache for the batch, which is continued.
        question_ids: ``[1, q]`` for each sequence; shorter ones are padded on the left.
        max_new_tokens: most tokens of an answer.
        generation: options of transformers' ``GenerationConfig``.
        streamer: gets the tokens as they come, those of the question first.
        text_ids: ``[1, T]`` tokens of the text that the cache holds, which some options read, such
            as ``repetition_penalty``; None where they are not known.

    Raises:
        CachepressError: if transformers refuses the options, or they do not fit answers from a
            cache.
    """
    check_generation(generation)
    use_shift(cache, model)
    try:
        return _generate(
            model, tokenizer, cache, question_ids, max_new_tokens, generation, streamer, text_ids
        )
    except CachepressError:
        raise
    except _REFUSALS as error:
        if not generation or is_out_of_memory(error):
            raise
        raise CachepressError(
            f"generation options {shown(dict(generation))}: {said(error)}"
        ) from error


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache,
    question_ids: Sequence[Tensor],
    max_new_tokens: int,
    generation: Mapping[str, object],
    streamer: BaseStreamer | None,
    text_ids: Tensor | None,
) -> Generated:
    ends = end_tokens(model, tokenizer, generation)
    pad = tokenizer.pad_token_id
    pad = pad if isinstance(pad, int) else (ends or [0])[0]
    ids, mask = _padded(question_ids, cache.get_seq_length(), pad)
    if ids.shape[1] > 1:
        check_continues(model, cache)
    text = _text_read(model, generation, text_ids)
    if text is not None:
        # Padding counts as the last token of the text, so that it adds none.
        ids = torch.where(mask[:, -ids.shape[1] :] > 0, ids, text[:, -1:])
        ids = torch.cat([text.expand(len(ids), -1), ids], dim=1)
        streamer = None if streamer is None else _WithoutText(streamer, text.shape[1])
    options = {"do_sample": False, "pad_token_id": pad, **_USUAL, **generation, "use_cache": True}
    config = _FromCache(**{**options, "eos_token_id": ends or None}, max_new_tokens=max_new_tokens)
    beams = config.num_beams or model.generation_config.num_beams or 1
    if (n := max(beams, config.num_return_sequences or 1)) > 1:
        rows = torch.arange(len(ids)).repeat_interleave(n)
        cache.reorder_cache(cast(torch.LongTensor, rows))
    with torch.no_grad():
        out = cast(Callable[..., Tensor | ModelOutput], model.generate)(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            tokenizer=tokenizer if generation.get("stop_strings") else None,
            streamer=streamer,
            **{cache_argument(model): cache},
        )
    output = out if isinstance(out, ModelOutput) else None
    sequences = cast(Tensor, out if output is None else output["sequences"])
    answers = sequences[:, ids.shape[1] :].tolist()
    return Generated([_until(answer, ends) for answer in answers], output)


def _text_read(
    model: PreTrainedModel, generation: Mapping[str, object], text_ids: Tensor | None
) -> Tensor | None:
    """Return the text's tokens if an option of the call, or of the model's config, reads them."""
    own = {k: x for k, x in model.generation_config.to_dict().items() if x is not None}
    name = text_reader({**own, **generation})
    if name is None or (text_ids is None and name not in generation):
        return None
    if looks_up(generation):
        # transformers would read the text again behind what the cache holds.
        raise CachepressError(
            f"generation: {name} reads the tokens of the text, which prompt_lookup_num_tokens "
            f"cannot be given here: leave one of them out, or set {name} to its default"
        )
    if text_ids is None:
        raise CachepressError(
            f"generation: {name} reads the tokens of the text, which this cache does not know: "
            "fill one with cachepress.prefill or the pipeline, from one sequence"
        )
    return text_ids


class _WithoutText(BaseStreamer):
    """Streams to another streamer, without the text before the question.

    Args:
        streamer: the other one.
        n: tokens of the text.
    """

    def __init__(self, streamer: BaseStreamer, n: int) -> None:
        self._streamer, self._n = streamer, n

    def put(self, value: Tensor) -> None:
        """Pass tokens on; the first ones are those of the prompt."""
        self._streamer.put(value[..., self._n :])
        self._n = 0

    def end(self) -> None:
        """Pass on that nothing follows."""
        self._streamer.end()


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
    if ids.shape[1] > 1:
        check_continues(model, cache)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    shift = shift_of(cache, model)
    positions = positions if shift is None else positions + shift.to(positions)
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
