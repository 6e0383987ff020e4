"""Checks that a cache from a file fits its model and itself: counts, positions, shapes, layers.

A file may be damaged or forged, and a checksum can be forged too. What passes these checks can be
read without an index out of bounds; whether its numbers are those that the model computed is not,
and cannot be, checked.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cachepress.cache.codec import Codec, Quantized
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.segment import Segment
from cachepress.cache.tail import Tail
from cachepress.limits import MOST, MOST_TOKENS, is_whole
from cachepress.ops import wide_dtype
from cachepress.ops.paged_attention import PAGE, Layout

_RECORDS = "record_past"
"""The field of transformers' cache layers that hold more than they need, for assisted decoding."""
_HERE = "as the model makes them here; what was filled under autocast is loaded under it"


@dataclass(frozen=True)
class Fitting:
    """Requirements of every cache of a model, found from sample caches that the model filled.

    Attributes:
        compressed: a cache of one token whose full-attention layers are compressed layers.
        one: a cache of one sequence of one token.
        two: a cache of two sequences of two tokens.
        vocabulary: number of tokens that the model knows.
        positions: the most tokens of a text, where the model learned an embedding for each
            position.
    """

    compressed: Cache
    one: Cache
    two: Cache
    vocabulary: int
    positions: int | None

    def check_layer(self, index: int, state: Mapping[str, object], batch: int) -> None:
        """Raise ValueError unless a cache layer of transformers can be in this state."""
        one, two = (vars(cache.layers[index]) for cache in (self.one, self.two))
        grown = state.get(_RECORDS) is True
        for name, sample in one.items():
            if name == _RECORDS and isinstance(state.get(name), bool):
                continue
            if not _is_like(state.get(name), sample, two[name], batch, grown):
                raise ValueError(f"layer {index}: its {name} is not what the model makes")

    def check_text(self, ids: Tensor, cache: Cache) -> None:
        """Raise ValueError unless token ids can be those of a cache's text, or of its beginning."""
        _need(ids.dtype == torch.int64 and ids.ndim == 2 and len(ids) == 1, "token ids")
        _need(0 < ids.shape[1] <= cache.get_seq_length() and int(ids.min()) >= 0, "ids of its text")
        _need(int(ids.max()) < self.vocabulary, "ids that the model knows")

    def check(self, cache: Cache) -> None:
        """Raise ValueError unless all layers hold what they can hold, and of one text."""
        seen, batch = cache.get_seq_length(), _sequences(cache)
        # A mask of the whole text is made for every forward: a huge text would exhaust memory.
        most = MOST if self.positions is None else self.positions
        _need(is_whole(seen, 1, most), "a number of tokens that the model can have seen")
        _need(is_whole(batch, 1), "sequences")
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, CompressedLayer):
                _need((layer.batch_size, layer.get_seq_length()) == (batch, seen), "one text")
                sample = self.compressed.layers[index]
                _LayerCheck(layer, sample.keys, sample.values).run()  # type: ignore
                continue
            self.check_layer(index, vars(layer), batch)
            if isinstance(keys := getattr(layer, "keys", None), Tensor):
                _need(cache.get_seq_length(index) == seen, "one text in all layers")
                _check_length(layer, keys, getattr(layer, "values", None))


def check_pages(parts: Mapping[str, object]) -> None:
    """Raise ValueError unless a segment of these parts has the pages that its layout says."""
    shape, layout, positions = parts["shape"], parts["layout"], parts["positions"]
    _need(_counts(shape) and len(shape) == 2, "a shape")  # type: ignore
    _need(isinstance(layout, Layout) and _counts(layout.lengths, least=0), "lengths")  # type: ignore
    _need(len(layout.lengths) == shape[0] * shape[1], "a length for each head")  # type: ignore
    _need(isinstance(positions, Tensor), "positions")
    pages = (layout.n_pages, PAGE)  # type: ignore
    _need(positions.dtype == torch.int32 and positions.shape == pages, "positions in pages")  # type: ignore
    _need(layout.device == positions.device, "pages on its device")  # type: ignore


@dataclass(frozen=True)
class _LayerCheck:
    """Checks a compressed layer against keys and values as the model makes them.

    Attributes:
        layer: the compressed layer.
        key: keys of a sample layer, for their heads, size and type.
        value: values of it.
    """

    layer: CompressedLayer
    key: Tensor
    value: Tensor

    def run(self) -> None:
        """Raise ValueError unless everything fits together."""
        layer, state = self.layer, vars(self.layer)
        counts = [state[name] for name in ("_batch", "_seen", "_compressed_at", "scored_at")]
        _need(_counts(tuple(counts), least=0), "counts")
        batch, seen, compressed, scored = counts
        _need(max(compressed, scored) <= seen, "counts that fit")
        _need(state["query_stats"] is None, "no statistics of a text that is not over")
        _need(isinstance(state["_encoded"], bool), "flags")
        _need(layer.codec is None or isinstance(layer.codec, Codec), "a codec")
        _need(layer.page_budget is None or is_whole(layer.page_budget, 1), "pages to read")
        segments, tail = state["_segments"], state["_tail"]
        _need(
            isinstance(segments, tuple) and all(isinstance(x, Segment) for x in segments),
            "segments",
        )
        _need(tail is None or isinstance(tail, Tail), "a tail")
        self._check_text_valid(batch, compressed)
        if tail is not None:
            self._check_tail(tail, batch)
        start = seen - (0 if tail is None else tail.n)
        _need(start >= compressed, "as many tokens as there are pairs")
        _need(bool(segments) or not compressed, "the pairs that were kept")
        self._check_segments(segments, batch, start, compressed)
        if state["_encoded"]:
            self._check_encoded(segments)

    def _check_text_valid(self, batch: int, compressed: int) -> None:
        text_valid = self.layer.text_valid
        if text_valid is None:
            return
        _need(isinstance(text_valid, Tensor) and text_valid.dtype == torch.bool, "a mask")
        _need(text_valid.shape == (batch, compressed), "a mask of the text")

    def _check_tail(self, tail: Tail, batch: int) -> None:
        held = tail.read()
        for x, like in ((held.keys, self.key), (held.values, self.value)):
            heads, width = like.shape[1], like.shape[3]
            _need(x.shape == (batch, heads, tail.n, width) and tail.n > 0, "a tail of its heads")
            _need(x.dtype == like.dtype, f"a tail of {like.dtype}, {_HERE}")

    def _check_segments(
        self, segments: Sequence[Segment], batch: int, start: int, compressed: int
    ) -> None:
        """Check that positions rise from segment to segment, and miss none since compression."""
        ends: Tensor | None = None
        held = torch.zeros(1, self.key.shape[1], dtype=torch.long)
        for segment in segments:
            _need(batch % segment.shape[0] == 0, "sequences that share pairs")
            _need(segment.shape[1] == self.key.shape[1], "as many heads as the layer")
            first, last, newer = self._check_segment(segment, start, compressed)
            if ends is None:
                ends, held = last, newer
                continue
            sequences = math.lcm(len(ends), len(first))
            ends, held, first, last, newer = (
                _repeated(x, sequences) for x in (ends, held, first, last, newer)
            )
            _need(bool((first > ends).all()), "positions that rise from segment to segment")
            ends, held = torch.maximum(ends, last), held + newer
        _need(
            bool((held == start - compressed).all()),
            "the pairs of all tokens since the compression",
        )

    def _check_segment(
        self, segment: Segment, start: int, compressed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Check one segment.

        Returns:
            The first and the last position in each head, and the number of its pairs since the
            layer was compressed, ``[F, H]`` each for F sequences. Positions of empty heads are
            such that any others can precede and follow them.
        """
        layout, pages = segment.layout, segment.layout.n_pages
        table, real = layout.padded()
        positions = torch.where(real, segment.positions.flatten()[table], -1)
        used = int((segment.positions >= 0).sum())
        _need(used == sum(layout.lengths) == int((positions >= 0).sum()), "positions in used slots")
        _need(not used or int(positions.max()) < start, "positions in the text")
        rising = (positions[:, 1:] > positions[:, :-1]) | ~real[:, 1:]
        _need(bool(rising.all()), "rising positions")
        width = self.key.shape[3]
        stored = width if segment.key_channels is None else self._stored_channels(segment)
        _need(is_whole(segment.width, width, width), "channels")
        _check_numbers(segment.keys, self.key, (pages, PAGE, stored), of_channels=True)
        size = self.value.shape[3]
        _check_numbers(segment.values, self.value, (pages, PAGE, size), of_channels=False)
        self._check_columns(segment, stored)
        shape = segment.shape
        if not positions.shape[1]:
            nothing = torch.full(shape, start, device=positions.device)
            return nothing, torch.full_like(nothing, -1), torch.zeros(shape, dtype=torch.long)
        first = positions[:, 0].masked_fill(~real[:, 0], start)
        newer = (positions >= compressed).sum(-1)
        return first.view(shape), positions.amax(-1).view(shape), newer.view(shape).cpu()

    def _stored_channels(self, segment: Segment) -> int:
        """Check the key channels that are stored, and return their number."""
        channels = segment.key_channels
        _need(isinstance(channels, Tensor) and channels.dtype == torch.int64, "channels")
        assert channels is not None
        _need(channels.ndim == 2 and len(channels) == len(segment.layout.lengths), "channels")
        _need(channels.shape[1] > 0 and bool((channels.diff(dim=-1) > 0).all()), "rising channels")
        _need(int(channels.min()) >= 0 and int(channels.max()) < self.key.shape[3], "key channels")
        return channels.shape[1]

    def _check_columns(self, segment: Segment, stored: int) -> None:
        pages, rope, bounds = segment.layout.n_pages, segment.rope, segment.bounds
        if rope is not None:
            _need(_is(rope, torch.int32, (pages, PAGE)), "positions that keys are rotated to")
            least, most = (int(x) for x in rope.aminmax()) if rope.numel() else (0, 0)
            _need(least >= -1 and most < self.layer.get_seq_length(), "rotations in the text")
        for numbers in (segment.token_state, segment.bias):
            if numbers is not None:
                _need(_is(numbers, wide_dtype(self.key), (pages, PAGE)), "a number for each slot")
        if bounds is not None:
            _need(isinstance(segment.keys, Tensor), "bounds of keys that are not quantized")
            _need(_is(bounds, self.key.dtype, (pages, 2, stored)), "bounds of each page")

    def _check_encoded(self, segments: Sequence[Segment]) -> None:
        """Check that the last segment can grow by full pages: all of its own must be full."""
        _need(bool(segments), "pages that grow")
        last = segments[-1]
        _need((last.layout.even or 1) % PAGE == 0, "full pages")
        _need(
            last.rope is last.token_state is last.bias is last.key_channels is None,
            "pages of pairs as they came",
        )


def _check_numbers(
    x: Tensor | Quantized, like: Tensor, shape: tuple[int, int, int], of_channels: bool
) -> None:
    """Check that pages have the model's shapes and types; scales are of channels, or of tokens."""
    if isinstance(x, Tensor):
        _need(_is(x, like.dtype, shape), f"pages of {like.dtype}, {_HERE}")
        return
    _need(isinstance(x, Quantized) and is_whole(x.bits, 2) and x.bits in (2, 4, 8), "bits")
    pages, slots, width = shape
    _need(width * x.bits % 8 == 0, "whole bytes")
    _need(_is(x.codes, torch.uint8, (pages, slots, width * x.bits // 8)), "codes of each number")
    _need(x.dtype is like.dtype, f"codes of {like.dtype}, {_HERE}")
    if of_channels:
        _need(x.group is None, "a scale for each channel")
        each = (pages, 1, width)
    else:
        _need(x.group is None or is_whole(x.group, 1), "channels that share a scale")
        each = (pages, slots, -(-width // (x.group or width)))
    kind = getattr(x.scale, "dtype", None)
    _need(kind in (torch.float16, torch.float32), "scales")
    _need(_is(x.scale, kind, each) and _is(x.zero, kind, each), "scales")  # type: ignore


def _check_length(layer: object, keys: Tensor, values: object) -> None:
    """Check that a layer of transformers holds as many keys and values as it says for masks."""
    _need(isinstance(values, Tensor) and keys.shape[2] == values.shape[2], "as many values as keys")  # type: ignore
    promised, _ = layer.get_mask_sizes(1)  # type: ignore
    held = keys.shape[2] + 1
    recording = getattr(layer, _RECORDS, False)
    _need(held == promised or (recording and promised <= held), "the keys that its mask is for")


def _is_like(value: object, one: object, two: object, batch: int, grown: bool) -> bool:
    """Tell whether a value is possible where two sample caches have ``one`` and ``two``.

    What the samples have in common is the same in every cache; where they differ it is a number of
    sequences or tokens. ``grown`` is for layers that hold more of the past than they need.
    """
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return isinstance(value, Tensor) and _is_tensor_like(value, one, two, batch, grown)
    if isinstance(one, torch.device):
        return isinstance(value, torch.device)
    if type(value) is not type(one):
        return False
    if isinstance(one, Mapping) and isinstance(two, Mapping) and isinstance(value, Mapping):
        same = list(value) == list(one)
        return same and all(_is_like(value[k], one[k], two[k], batch, grown) for k in one)
    if isinstance(value, list | tuple) and isinstance(one, list | tuple):
        inner = zip(value, one, cast(Sequence[object], two), strict=False)
        same = len(value) == len(one)
        return same and all(_is_like(v, x, y, batch, grown) for v, x, y in inner)
    if isinstance(one, int) and not isinstance(one, bool) and one != two:
        return is_whole(value, 1, MOST_TOKENS)
    return bool(value == one)


def _is_tensor_like(x: Tensor, one: Tensor, two: Tensor, batch: int, grown: bool) -> bool:
    if x.dtype != one.dtype or x.ndim != one.ndim:
        return False
    if not one.is_floating_point() and one.shape == two.shape and torch.equal(one, two):
        return torch.equal(x, one)
    for place, (size, least, other) in enumerate(zip(x.shape, one.shape, two.shape, strict=True)):
        if least != other:
            fits = size == batch if place == 0 else size > 0
        else:
            fits = size == least or (grown and 0 < place == x.ndim - 1 and size > least)
        if not fits:
            return False
    return True


def _sequences(cache: Cache) -> int:
    """Count the sequences that a cache holds."""
    for layer in cache.layers:
        if isinstance(layer, CompressedLayer):
            return layer.batch_size
        if isinstance(keys := getattr(layer, "keys", None), Tensor) and keys.ndim:
            return len(keys)
    raise ValueError("it holds no keys")


def _repeated(x: Tensor, sequences: int) -> Tensor:
    """Repeat numbers ``[F, H]`` of F sequences for more of them, which share these in turn."""
    return x.repeat(sequences // len(x), 1)


def _is(x: object, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return isinstance(x, Tensor) and x.dtype == dtype and x.shape == shape


def _counts(values: object, least: int = 1) -> bool:
    """Tell whether values are a tuple of integers of at least ``least``."""
    return isinstance(values, tuple) and all(is_whole(x, least, MOST_TOKENS) for x in values)


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"it does not have {what}")
