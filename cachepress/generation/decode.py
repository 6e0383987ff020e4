"""Decodes tokens after what a cache holds, in a loop that seldom waits for the device.

transformers' ``generate()`` asks after every token whether all sequences have ended, and a GPU that
is done with a token runs dry until the host has the answer and launches the next. Here ends are
found on the device, and the host asks once in ``LOT`` tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeGuard, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.streamers import BaseStreamer

from cachepress.cache.batch import compressed_layers, sequences_of
from cachepress.cache.layer import CompressedLayer
from cachepress.errors import CachepressError
from cachepress.hf import (
    cache_argument,
    check_continues,
    learned_positions,
    shift_of,
    text_decoder,
    use_shift,
)
from cachepress.hf.blocks import acting
from cachepress.limits import MOST_SEED, check_whole, said, shown
from cachepress.settings import compiled_here

LOT = 16
"""Tokens that are decoded between two looks at whether all sequences have ended."""
Choose = Callable[[Tensor, Tensor], Tensor]
"""Chooses the next token ``[B]``: ``(token ids so far [B, n], logits [B, vocabulary])``."""


def decode(
    model: PreTrainedModel,
    cache: Cache,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    logits_processor: LogitsProcessorList | None = None,
    streamer: BaseStreamer | None = None,
    compile: bool | None = None,
) -> Tensor:
    """Decode tokens after a cache, greedily or by sampling, faster than ``generate()`` on a GPU.

    The tokens are those of ``model.generate()`` with the same options, and so is the cache
    afterwards: it holds all but the last token, and a further call goes on from there. Ends are
    found on the device, and the host waits for it once in 16 tokens. Where a cache cannot forget
    the tokens beyond the end (transformers' own layers with sliding windows, recurrent states or
    buffers of fixed size), and inside ``with press(model)``, it waits for every token.

    If it is interrupted, by an error or from the keyboard, the cache is put back to the text that
    it held before, as far as its layers can forget tokens; ``cachepress.fork`` protects others.

    Args:
        model: a transformers model with a language-model head.
        cache: the cache that is continued, compressed or not, of as many sequences as
            ``input_ids``; it may be empty.
        input_ids: ``[B, q]`` tokens that the cache does not hold yet, at least one, such as those
            of a question; shorter ones are padded on the left.
        max_new_tokens: most tokens that are decoded.
        attention_mask: ``[B, q]``, 0 for padding, or ``[B, seen + q]`` if there is padding in the
            text that the cache holds; None where there is none at all.
        eos_token_id: tokens that end a sequence; None for those of the model's generation config,
            an empty list for none.
        pad_token_id: follows after the end of a sequence; None for that of the generation config,
            or the first token of ``eos_token_id``.
        do_sample: draw each token from the distribution, in place of the most likely one. Sampling
            options of the generation config are not read.
        temperature: divides the logits, for sampling.
        top_k: draw from this many tokens of the highest probabilities only; None for all.
        top_p: draw from the smallest set of tokens with at least this probability; None for all.
        seed: of the random numbers; None for those of ``torch.manual_seed``.
        logits_processor: further processors of transformers for the logits, which come first; they
            are given the tokens of ``input_ids`` and the decoded ones, not those in the cache.
        streamer: gets the tokens of ``input_ids`` and then each decoded one, in lots of 16.
        compile: on a GPU, whether torch.compile compiles the model before a step is recorded, see
            ``cachepress.configure``; None for what that says.

    Returns:
        The decoded tokens ``[B, n]``, with end tokens, up to where the last sequence ended.

    Raises:
        CachepressError: if an argument is wrong, or cache and tokens do not fit each other.
    """
    check_whole("max_new_tokens", max_new_tokens)
    choose = _chooser(logits_processor, do_sample, temperature, top_k, top_p, seed, model.device)
    _check_ids(model, cache, input_ids, max_new_tokens)
    seen, ids = int(cache.get_seq_length()), input_ids.to(model.device)
    forwards = _Forwards(model, cache, ids, attention_mask, max_new_tokens)
    ends, pad = _special(model, eos_token_id, pad_token_id)
    try:
        with torch.no_grad(), compiled_here(compile):
            tokens = _decoded(forwards, ids, max_new_tokens, choose, ends, pad, streamer)
            _crop(cache, seen + ids.shape[1] + tokens.shape[1] - 1)
    except BaseException:
        # What was compressed in between cannot be put back, and the first error is the one to see.
        with suppress(CachepressError):
            _crop(cache, seen)
        raise
    return tokens


class _Forwards:
    """Calls a model for tokens that follow what a cache holds.

    Args:
        model: the model.
        cache: the cache.
        ids: ``[B, q]`` the first tokens.
        mask: ``[B, q]`` or ``[B, seen + q]``, 0 for padding; None for no padding.
        new: most tokens that come after them.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor | None, new: int
    ) -> None:
        self._model, self._cache, self._name = model, cache, cache_argument(model)
        (b, q), self._read = ids.shape, int(cache.get_seq_length())
        if self._read and q > 1:
            check_continues(model, cache)
        use_shift(cache, model)
        self._mask = _whole_mask(mask, b, q, self._read, new, ids.device)
        shift, columns = shift_of(cache, model), self._read + q + new
        self._positions = None
        if self._mask is not None:
            # Recurrent layers of older transformers read padding: at generate()'s position for it.
            self._positions = (self._mask.cumsum(-1) - 1).masked_fill(self._mask == 0, 0)
        elif shift is not None:
            self._positions = torch.arange(columns, device=ids.device).expand(b, -1)
        if self._positions is not None and shift is not None:
            self._positions = self._positions + shift.to(self._positions)

    def logits(self, ids: Tensor) -> Tensor:
        """Read tokens ``[B, n]``, and return the logits ``[B, vocabulary]`` after the last one."""
        start, self._read = self._read, self._read + ids.shape[1]
        given: dict[str, object] = {"use_cache": True, "logits_to_keep": 1, self._name: self._cache}
        if self._mask is not None:
            given["attention_mask"] = self._mask[:, : self._read]
        if self._positions is not None:
            given["position_ids"] = self._positions[:, start : self._read]
        # As generate() does, so that ties of half types are the same ones.
        return self._model(input_ids=ids, **given).logits[:, -1].float()

    def lot(self) -> int:
        """Count the tokens that may be read before it is known whether they are wanted.

        The quantised part of a tail cannot be put back, and a press may compress at any token.
        """
        layers = self._cache.layers
        if acting(text_decoder(self._model)) is not None or not all(map(_is_cropped, layers)):
            return 1
        codecs = (layer.codec for layer in compressed_layers(self._cache))
        return min([LOT, *(codec.residual + 1 for codec in codecs if codec is not None)])


def _decoded(
    forwards: _Forwards,
    ids: Tensor,
    new: int,
    choose: Choose,
    ends: Sequence[int],
    pad: int,
    streamer: BaseStreamer | None,
) -> Tensor:
    """Decode up to ``new`` tokens after ``ids [B, q]``, until every sequence ended."""
    (b, q), end_ids = ids.shape, torch.tensor(ends, dtype=torch.long, device=ids.device)
    text = torch.cat([ids, ids.new_full((b, new), pad)], dim=1)
    lengths, given, n, lot = ids.new_full((b,), new), 0, new, 1
    if streamer is not None:
        streamer.put(ids.cpu())
    for i in range(new):
        logits = forwards.logits(text[:, q + i - 1 : q + i] if i else ids)
        # Where the cache was empty, its layers are made by the first forward.
        lot = lot if i else forwards.lot()
        token = choose(text[:, : q + i], logits)
        if ends:
            token = token.masked_fill(lengths <= i, pad)
            ended = (token[:, None] == end_ids).any(-1)
            lengths = torch.where(ended, lengths.clamp(max=i + 1), lengths)
        text[:, q + i] = token
        if (i + 1) % lot and i + 1 < new:
            continue
        n = int(lengths.max()) if ends else new
        if streamer is not None:
            for token in text[:, q + given : q + min(n, i + 1)].cpu().unbind(1):
                streamer.put(token)
            given = i + 1
        if n <= i + 1:
            break
    if streamer is not None:
        streamer.end()
    return text[:, q : q + n]


def _chooser(
    processors: LogitsProcessorList | None,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    device: torch.device,
) -> Choose:
    """Make what chooses the next token, by transformers' own logits processors."""
    made = LogitsProcessorList(processors or [])
    if not do_sample:
        if (temperature, top_k, top_p, seed) != (1.0, None, None, None):
            raise CachepressError(
                "temperature, top_k, top_p and seed are for sampling: give do_sample=True, or "
                "leave them out"
            )
        return lambda text, logits: made(cast(torch.LongTensor, text), logits).argmax(-1)
    try:
        if temperature != 1.0:
            made.append(TemperatureLogitsWarper(temperature))
        if top_k is not None:
            made.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            made.append(TopPLogitsWarper(top_p))
    except (TypeError, ValueError) as error:
        raise CachepressError(f"sampling: {said(error)}") from error
    generator = None
    if seed is not None:
        check_whole("seed", seed, 0, MOST_SEED)
        generator = torch.Generator(device).manual_seed(seed)
    return lambda text, logits: _drawn(made(cast(torch.LongTensor, text), logits), generator)


def _drawn(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a token for each sequence; unlike ``torch.multinomial`` this never asks the device.

    Of waiting times with the rates p the first one to end is that of a token with probability p.
    """
    p = logits.softmax(-1)
    times = torch.empty_like(p).exponential_(generator=generator)
    return (p / times.clamp_(min=torch.finfo(p.dtype).tiny)).argmax(-1)


def _special(
    model: PreTrainedModel, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None
) -> tuple[list[int], int]:
    """Return the tokens that end a sequence, and the one that follows after an end."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None) if eos_token_id is None else eos_token_id
    ends = [found] if isinstance(found, int) else list(found or ())
    pad = getattr(config, "pad_token_id", None) if pad_token_id is None else pad_token_id
    return ends, (ends or [0])[0] if pad is None else pad


def _whole_mask(
    mask: Tensor | None, b: int, q: int, seen: int, new: int, device: torch.device
) -> Tensor | None:
    """Check a mask, and make one of all columns ``[B, seen + q + new]``; None if all are visible.

    Raises:
        CachepressError: if its shape is wrong, or there is padding on the right.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or tuple(mask.shape) not in {(b, q), (b, seen + q)}:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else shown(mask)
        raise CachepressError(
            f"attention_mask: got {got}, wanted {(b, q)} for input_ids alone, or {(b, seen + q)} "
            "with what the cache holds"
        )
    mask = mask.long()
    least, last = torch.stack([mask.min(), mask[:, -1].min()]).tolist()
    if not last:
        raise CachepressError(
            "attention_mask: got padding on the right, wanted it on the left: set the tokenizer's "
            'padding_side to "left"'
        )
    if least:
        return None
    before, after = mask.new_ones(b, seen + q - mask.shape[1]), mask.new_ones(b, new)
    return torch.cat([before, mask, after], dim=1).to(device)


def _check_ids(model: PreTrainedModel, cache: Cache, ids: Tensor, new: int) -> None:
    """Raise CachepressError unless tokens can follow what a cache holds."""
    if not isinstance(cache, Cache):
        raise CachepressError(f"cache: got {shown(cache)}, wanted one of transformers")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        got = f"shape {tuple(ids.shape)}, {ids.dtype}" if isinstance(ids, Tensor) else shown(ids)
        raise CachepressError(f"input_ids: got {got}, wanted token ids [B, q] with q > 0")
    (b, q), seen, held = ids.shape, int(cache.get_seq_length()), sequences_of(cache)
    if seen and held not in (0, b):
        raise CachepressError(
            f"the cache holds {held} sequences and input_ids has {b}: wanted the same number; "
            "cachepress.fork(cache, n) continues one text n times"
        )
    most = learned_positions(model)
    if most is not None and seen + q + new - 1 > most:
        raise CachepressError(
            f"no room: {seen} tokens in the cache, {q} of input_ids and {new} new ones, where the "
            f"model has {most} positions: give a smaller max_new_tokens"
        )
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    low, high = torch.stack(ids.aminmax()).tolist()
    if size is not None and not 0 <= low <= high < size:
        raise CachepressError(
            f"input_ids: got tokens from {low} to {high}, wanted those of the model's vocabulary, "
            f"0 to {size - 1}"
        )


def _is_cropped(layer: object) -> TypeGuard[CompressedLayer | DynamicLayer]:
    """Tell whether a cache layer can forget its last tokens, whatever it has read before."""
    return type(layer) in (CompressedLayer, DynamicLayer)


def _crop(cache: Cache, length: int) -> None:
    """Forget what a cache read after its first ``length`` tokens, in the layers that can."""
    for layer in cache.layers:
        if _is_cropped(layer) and (surplus := layer.get_seq_length() - length) > 0:
            layer.crop(-surplus)
