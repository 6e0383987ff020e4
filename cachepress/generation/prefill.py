"""Reads a prompt into a cache, in one forward or in chunks, and compresses it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import logging

from cachepress.cache.batch import note_text, text_of, trim
from cachepress.cache.codec import Codec
from cachepress.errors import CachepressError, out_of_memory
from cachepress.generation.ids import token_ids
from cachepress.given import press_of
from cachepress.hf import (
    PressSession,
    as_one_forward,
    cache_argument,
    check_continues,
    codec_of,
    install_layers,
    shift_before,
    text_decoder,
    use_shift,
)
from cachepress.limits import MOST_TOKENS, check_whole, described, is_out_of_memory, shown
from cachepress.measure import Stopwatch
from cachepress.press import BasePress

MODES = ("exact", "online")


def prefill(
    model: PreTrainedModel,
    input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]] | Mapping[str, object],
    press: BasePress | str | None = None,
    cache: Cache | None = None,
    *,
    attention_mask: Tensor | None = None,
    chunk_size: int | None = None,
    mode: str = "exact",
    storage: str | Codec = "full",
    offload: bool = False,
    question: int | Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = False,
    stopwatch: Stopwatch | None = None,
) -> Cache:
    """Read a prompt into a cache, without the LM head, and compress it.

    Args:
        model: a transformers decoder model.
        input_ids: ``[B, T]``, as a tensor or lists, or what a tokenizer returned, of which the
            attention mask counts, too.
        press: the press, or its spelling, such as "snapkv(0.5)"; None keeps every pair.
        cache: a cache that is continued; None for a new one.
        attention_mask: ``[B, T]``, 0 for padding, or ``[B, seen + T]`` after what the cache holds.
        chunk_size: tokens of one forward; None for all. Bounds the memory of activations.
        mode: "exact" compresses after the last chunk, with the same result as one forward. "online"
            compresses after each chunk, to the budget of what was read so far, which bounds the
            memory of keys and values as well; later tokens then never attend to evicted pairs.
        storage: how kept pairs are stored: "full" in the model's type, or as the press declares;
            "int8", "int4", "int2", or a ``Codec``.
        offload: keep what is compressed in host memory, and bring the pairs of a layer to the
            device while the layer before computes, in every forward. Later tokens stay on the
            device. Answers are the same, and slower. A cache that is offloaded stays so.
        question: number of tokens at the end of the prompt that are the question, one number or one
            for each sequence; for presses that need it.
        tokenizer: for presses that reconstruct the context; None to load the one that was saved
            with the model.
        progress: show a bar over the chunks.
        stopwatch: adds up the seconds in which layers are observed and compressed.

    Returns:
        The cache.

    Raises:
        CachepressError: if an argument is wrong or the combination cannot work.
    """
    press = press_of(press)
    check_prefill(press, chunk_size, mode, storage, offload)
    input_ids, attention_mask = token_ids(input_ids, attention_mask)
    _check_ids(input_ids, cache)
    decoder = text_decoder(model)
    cache = DynamicCache(config=decoder.config) if cache is None else cache
    name = cache_argument(decoder)
    ids = input_ids.to(model.device)
    seen, n = cache.get_seq_length(), ids.shape[1]
    mask = None if attention_mask is None else _whole(attention_mask.to(model.device), seen, n)
    positions = _positions(mask, shift_before(cache, model, len(ids)), seen + n)
    chunk_size = n if chunk_size is None else chunk_size
    starts = range(0, n, chunk_size)
    if min(chunk_size, n) > 1 and (seen or len(starts) > 1):
        check_continues(model, cache)
    bar = logging.tqdm(starts, unit="chunk", disable=not progress)
    session = None
    if press is not None:
        session = PressSession(
            press,
            model,
            storage=storage,
            question=question,
            tokenizer=tokenizer,
            stopwatch=stopwatch,
        )
    if offload:
        install_layers(cache, model, offload)
    ends = _ends(positions, seen, chunk_size, n)
    with torch.no_grad(), _memory_explained(), as_one_forward(decoder, *ends):
        for start in bar:
            stop = min(start + chunk_size, n)
            inputs = {"input_ids": ids[:, start:stop], name: cache, "use_cache": True}
            if mask is not None:
                inputs["attention_mask"] = mask[:, : seen + stop]
            if positions is not None:
                inputs["position_ids"] = positions[:, seen + start : seen + stop].to(ids.device)
            if session is None:
                decoder(**inputs)
                trim(cache)
                continue
            session.chunk = "last" if stop == n else "hold" if mode == "exact" else "compress"
            with session:
                decoder(**inputs)
    note_text(cache, input_ids, seen)
    use_shift(cache, model)
    return cache


def _whole(mask: Tensor, seen: int, n: int) -> Tensor:
    """Extend a mask of the prompt alone, which means that all text before it is visible."""
    if mask.shape[1] != n or not seen:
        return mask
    return torch.cat([mask.new_ones(mask.shape[0], seen), mask], dim=1)


def _positions(mask: Tensor | None, shift: Tensor | None, length: int) -> Tensor | None:
    """Compute positions ``[B, length]`` of a text; None where they count its columns.

    Padding has no positions of its own: the first token of each text is at 0.
    """
    shift = shift if shift is not None and bool(shift.any()) else None
    if mask is None:
        return None if shift is None else torch.arange(length, device=shift.device) + shift
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return positions if shift is None else positions + shift.to(positions)


def _ends(positions: Tensor | None, seen: int, chunk_size: int, n: int) -> tuple[int, int]:
    """Return the highest position of the first chunk, and of all ``n`` tokens of a prompt."""
    first, last = min(chunk_size, n) - 1 + seen, n - 1 + seen
    if positions is None:
        return first, last
    return int(positions[:, first].max()), int(positions.max())


def read_context(
    model: PreTrainedModel,
    context_ids: Tensor,
    press: BasePress | None,
    cache: Cache | None = None,
    *,
    chunk_size: int | None = None,
    mode: str = "exact",
    storage: str | Codec = "full",
    offload: bool = False,
    question: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Cache, float]:
    """Prefill a context ``[1, T]`` and compress it, unless the cache holds it already.

    Args:
        model: the model.
        context_ids: the context.
        press: the press; None keeps every pair.
        cache: an empty cache to fill, or one that holds this context already.
        chunk_size: tokens of one forward; None for all.
        mode: "exact" or "online", see ``cachepress.prefill``.
        storage: "full", "int8", "int4", "int2", or a Codec.
        offload: whether what is compressed is kept in host memory.
        question: number of tokens at the end that are the question, for presses that need it.
        tokenizer: the model's tokenizer, for presses that reconstruct the context.

    Returns:
        The cache, and the seconds of the prefill.

    Raises:
        CachepressError: if the cache holds something else.
    """
    seen, n = 0 if cache is None else cache.get_seq_length(), context_ids.shape[1]
    if cache is not None and seen:
        if seen != n:
            raise CachepressError(
                f"the cache holds {seen} tokens but the context has {n}: pass an empty cache, or "
                "the one that this very context was compressed into"
            )
        text = text_of(cache)
        if text is not None and not torch.equal(text.cpu(), context_ids[:, : text.shape[1]].cpu()):
            raise CachepressError(
                "the cache holds another text of the same length: pass an empty cache, or the one "
                "that this very context was compressed into"
            )
        return cache, 0.0
    with Stopwatch(model.device) as stopwatch:
        cache = prefill(
            model,
            context_ids,
            press,
            cache,
            chunk_size=chunk_size,
            mode=mode,
            storage=storage,
            offload=offload,
            question=question,
            tokenizer=tokenizer,
        )
    return cache, stopwatch.seconds


@contextmanager
def _memory_explained() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error) from error


def _check_ids(input_ids: Tensor, cache: object) -> None:
    if cache is not None and not isinstance(cache, Cache):
        wanted = "wanted one of transformers: DynamicCache()"
        raise CachepressError(f"cache: got {described(cache)}, {wanted}")
    if input_ids.ndim != 2 or not input_ids.shape[1]:
        raise CachepressError(
            f"input_ids: got shape {tuple(input_ids.shape)}, wanted [B, T] with T > 0"
        )


def check_prefill(
    press: BasePress | None,
    chunk_size: int | None,
    mode: str,
    storage: str | Codec,
    offload: bool = False,
) -> None:
    """Raise CachepressError unless a press and the options of ``prefill`` fit each other."""
    if mode not in MODES:
        raise CachepressError(f"prefill mode: got {shown(mode)}, wanted one of {', '.join(MODES)}")
    given = [f"storage={storage!r}"] * (Codec.of(storage) is not None) + ["offload=True"] * offload
    if given and press is None:
        raise CachepressError(f"{given[0]} needs a press: KnormPress(0.0) keeps all pairs")
    if press is not None:
        codec_of(press, storage)
    if chunk_size is None:
        if mode == "online":
            raise CachepressError("online prefill compresses chunk by chunk: give a chunk size")
        return
    check_whole("prefill chunk size", chunk_size, most=MOST_TOKENS)
