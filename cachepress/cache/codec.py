"""Quantized storage of keys and values, in pages: keys by channel, values by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.errors import CachepressError
from cachepress.limits import MOST_TOKENS, check_whole, is_whole, shown
from cachepress.ops.gradients import without_gradient
from cachepress.ops.paged_attention import PAGE
from cachepress.ops.precision import wide

STORAGES = ("full", "int8", "int4", "int2")
_LEAST = 1e-7
"""The least step of a float16 scale."""
_MOST, _FINE = 6e4, torch.finfo(torch.float16).tiny
"""Numbers up to which a float16 scale holds when rounded, and the least step that it holds well."""
_LIMIT = torch.finfo(torch.float32).max / 2
"""Numbers beyond it are taken for it, so that ranges are numbers, too."""
_LOST = (
    "there is no gradient through keys and values that are rounded to int{}: run the forwards that "
    "are not differentiated under torch.no_grad(), or leave out storage and KIVIPress"
)
VALUE_GROUP = 32
"""Channels of a value that share a scale where there are only 2 bits."""


@dataclass(frozen=True)
class Codec:
    """Quantises kept pairs: how many bits a number has, and which numbers share a scale.

    Attributes:
        bits: of a number, 8, 4 or 2.
        residual: newest tokens of each head that stay in full precision.
        value_group: channels of a value that share a scale, the last ones fewer where they do not
            come out even; None for all channels.
    """

    bits: int
    residual: int = 64
    value_group: int | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.bits, 2) or self.bits not in (2, 4, 8):
            raise CachepressError(f"bits: got {shown(self.bits)}, wanted 2, 4 or 8")
        check_whole("residual", self.residual, 0, MOST_TOKENS)
        if self.value_group is not None:
            check_whole("value_group", self.value_group)

    @classmethod
    def of(cls, storage: "str | Codec") -> "Codec | None":
        """Return the codec of "int8", "int4" or "int2"; None for "full".

        Raises:
            CachepressError: for another name.
        """
        if isinstance(storage, Codec):
            return storage
        if not isinstance(storage, str) or storage not in STORAGES:
            raise CachepressError(
                f"storage: got {shown(storage)}, wanted one of {', '.join(STORAGES)}"
            )
        if storage == "full":
            return None
        bits = int(storage[3:])
        return cls(bits, value_group=VALUE_GROUP if bits == 2 else None)

    def encode_keys(self, pages: Tensor, used: Tensor, peak: float | None = None) -> "Quantized":
        """Quantise pages of keys ``[P, C, D]`` with a scale for each channel of a page.

        ``used [P, C]`` says which slots count, and ``peak`` is the pages' ``peak_of``, if known.
        """
        self.check(pages.shape[-1])
        hidden = ~used.unsqueeze(-1)
        low, high = _range(pages.detach(), hidden)
        return self._encode(pages, low.amin(1, keepdim=True), high.amax(1, keepdim=True), peak)

    def encode_values(self, pages: Tensor, peak: float | None = None) -> "Quantized":
        """Quantise pages of values ``[P, C, E]``, each with a scale for each group of channels.

        ``peak`` is the pages' ``peak_of``, if known.
        """
        self.check(pages.shape[-1])
        size = self.value_group or pages.shape[-1]
        low, high = _range(pages.detach(), torch.zeros_like(pages, dtype=torch.bool))
        low = torch.stack([group.amin(-1) for group in low.split(size, dim=-1)], dim=-1)
        high = torch.stack([group.amax(-1) for group in high.split(size, dim=-1)], dim=-1)
        return self._encode(pages, low, high, peak, self.value_group)

    def pair_bytes(self, keys: Tensor, values: Tensor) -> float:
        """Compute the bytes of a pair of a head, its share of the scales included.

        ``keys [B, H, T, D]`` and ``values [B, H, T, E]`` hold the pairs, among others.
        """
        key_size, value_size = keys.shape[-1], values.shape[-1]
        groups = -(-value_size // (self.value_group or value_size))
        numbers = (key_size + value_size) * self.bits / 8
        kinds = (self._scale_dtype(float(peak_of(x))) for x in (keys, values))
        of_keys, of_values = (2 * kind.itemsize for kind in kinds)
        return numbers + of_keys * key_size / PAGE + of_values * groups

    def check(self, size: int) -> None:
        """Raise CachepressError unless vectors of this size can be packed into bytes."""
        packed = 8 // self.bits
        if size % packed:
            raise CachepressError(
                f"int{self.bits} storage packs {packed} channels into a byte: got {size} channels"
            )

    def _encode(
        self,
        pages: Tensor,
        low: Tensor,
        high: Tensor,
        peak: float | None,
        group: int | None = None,
    ) -> "Quantized":
        steps = 2**self.bits - 1
        pages, in_graph = pages.detach(), pages.requires_grad
        # Where nothing is finite there is no range.
        low, high = (torch.where(low <= high, x, torch.zeros_like(x)) for x in (low, high))
        kind = self._scale_dtype(float(peak_of(pages)) if peak is None else peak)
        half = kind == torch.float16
        exact = torch.float32 if half else torch.float64
        zero = low.to(kind)
        scale = (high.to(exact) - zero.to(exact)) / steps
        scale = (scale.clamp(min=_LEAST) if half else scale).to(kind)
        scale = torch.where(scale == 0, torch.full_like(scale, _LEAST), scale)
        each_zero, each_scale = (_each(x.to(exact), group, pages.shape[-1]) for x in (zero, scale))
        codes = ((pages.to(exact) - each_zero) / each_scale).round_().clamp_(0, steps)
        codes = _packed(codes.nan_to_num_(nan=0.0).to(torch.uint8), self.bits)
        if in_graph:
            scale = without_gradient(scale, _LOST.format(self.bits))
        return Quantized(codes, scale, zero, self.bits, pages.dtype, group)

    def _scale_dtype(self, peak: float) -> torch.dtype:
        """Choose the type of the scales: float16 unless numbers of that size overflow it."""
        least = _FINE * (2**self.bits - 1) / 2
        return torch.float16 if peak == 0 or least <= peak <= _MOST else torch.float32


@dataclass(frozen=True)
class Quantized:
    """Quantized pages of keys or values.

    Attributes:
        codes: ``[P, C, D * bits / 8]`` uint8, with as many numbers in each as it has room for.
        scale: what a step is worth, ``[P, 1, D]``, or ``[P, C, groups]``; in float16, or in float32
            where a number is beyond what float16 can tell.
        zero: what code 0 stands for, in the shape and type of ``scale``.
        bits: of a number.
        dtype: what was encoded.
        group: channels that share a scale; None for a scale that is broadcast.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    dtype: torch.dtype
    group: int | None = None

    @property
    def form(self) -> tuple[object, ...]:
        """Type and shapes: pages of equal form can be concatenated."""
        shapes = tuple(x.shape[1:] for x in self.tensors())
        return (self.bits, self.dtype, self.group, *shapes)

    @property
    def width(self) -> int:
        """Channels of a key or value."""
        return self.codes.shape[-1] * 8 // self.bits

    def decode(self) -> Tensor:
        """Dequantise the pages, ``[P, C, D]``."""
        codes = _unpacked(self.codes, self.bits)
        zero, scale = (
            _each(x.float(), self.group, codes.shape[-1]) for x in (self.zero, self.scale)
        )
        return torch.addcmul(zero, codes.float(), scale).to(self.dtype)

    def bounds(self) -> Tensor:
        """Compute the lowest and highest number that keys of each page can be, ``[P, 2, D]``."""
        low = self.zero.float()
        return torch.cat([low, low + self.scale.float() * (2**self.bits - 1)], dim=1)

    def pages(self, change: Callable[[Tensor], Tensor]) -> "Quantized":
        """Apply ``change`` to every tensor ``[P, ...]``, as to pick or reorder pages."""
        return replace(
            self, codes=change(self.codes), scale=change(self.scale), zero=change(self.zero)
        )

    def tensors(self) -> list[Tensor]:
        """List all tensors that are allocated."""
        return [self.codes, self.scale, self.zero]


Stored = Tensor | Quantized
"""Pages of keys or values, as they are or quantised."""


def peak_of(x: Tensor) -> Tensor:
    """Find the largest size of a finite number, by which the type of scales is chosen, ``[1]``."""
    if not x.numel():
        return x.new_zeros(1, dtype=torch.float64)
    sizes = x.detach().abs()
    return sizes.masked_fill_(~sizes.isfinite(), 0).amax().double().view(1)


def floats(x: Stored) -> Tensor:
    """Return the numbers that may be a part of an autograd graph."""
    return x.scale if isinstance(x, Quantized) else x


def decoded(x: Stored) -> Tensor:
    """Return the numbers that are stored."""
    return x.decode() if isinstance(x, Quantized) else x


def changed(x: Stored, change: Callable[[Tensor], Tensor]) -> Stored:
    """Apply ``change`` to every tensor ``[P, ...]``, as to pick or reorder pages."""
    return x.pages(change) if isinstance(x, Quantized) else change(x)


def stacked_pages(parts: Sequence[Stored]) -> Stored:
    """Concatenate pages of equal form."""
    first = parts[0]
    if isinstance(first, Quantized):
        columns = [x.tensors() for x in parts if isinstance(x, Quantized)]
        codes, scale, zero = (torch.cat(column) for column in zip(*columns, strict=True))
        return replace(first, codes=codes, scale=scale, zero=zero)
    return torch.cat([x for x in parts if isinstance(x, Tensor)])


def joined_pages(x: Stored, y: Stored, join: Callable[[Tensor, Tensor], Tensor]) -> Stored:
    """Join each tensor of ``x`` with that of ``y``, which has an equal form."""
    if isinstance(x, Quantized) and isinstance(y, Quantized):
        codes, scale, zero = map(join, x.tensors(), y.tensors())
        return replace(x, codes=codes, scale=scale, zero=zero)
    assert isinstance(x, Tensor) and isinstance(y, Tensor)
    return join(x, y)


def bounds_of(keys: Tensor, used: Tensor) -> Tensor:
    """Compute the bounds ``[P, 2, D]`` of pages ``[P, C, D]``, over the slots in use."""
    keys, hidden = keys.detach(), ~used.unsqueeze(-1)
    low = keys.masked_fill(hidden, float("inf")).amin(1)
    high = keys.masked_fill(hidden, float("-inf")).amax(1)
    return torch.stack([low, high], dim=1)


def _range(pages: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Mask what no scale is computed from: ``pages`` to take the minimum of, and the maximum."""
    exact = wide(pages)
    hidden = hidden | ~exact.isfinite()
    exact = exact.clamp(-_LIMIT, _LIMIT)
    return exact.masked_fill(hidden, float("inf")), exact.masked_fill(hidden, float("-inf"))


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Pack numbers ``[P, C, D]`` of a few bits into bytes, the first in the lowest bits."""
    step = 8 // bits
    packed = codes[..., 0::step]
    for i in range(1, step):
        packed = packed | (codes[..., i::step] << (bits * i))
    return packed


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    """Unpack bytes into numbers ``[P, C, D]``."""
    if bits == 8:
        return codes
    most = 2**bits - 1
    return torch.stack([(codes >> i) & most for i in range(0, 8, bits)], dim=-1).flatten(-2)


def _each(x: Tensor, group: int | None, size: int) -> Tensor:
    """Repeat the number of each group of channels for all of ``size`` channels."""
    return x if group is None else x.repeat_interleave(min(group, size), dim=-1)[..., :size]
