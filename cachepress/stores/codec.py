"""Quantized pages: keys by channel, values by token."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachepress.errors import CachepressError
from cachepress.ops.ragged_attention import PAGE

STORAGES = ("full", "int8", "int4")


@dataclass(frozen=True)
class Codec:
    """How kept rows are stored.

    Attributes:
        bits: of a number, 8 or 4.
        residual: newest rows of each head that stay in full precision.
    """

    bits: int
    residual: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise CachepressError(f"bits: got {self.bits!r}, wanted 4 or 8")
        if not isinstance(self.residual, int) or self.residual < 0:
            raise CachepressError(f"residual: got {self.residual!r}, wanted a number of rows")

    @classmethod
    def of(cls, storage: "str | Codec") -> "Codec | None":
        """The codec of "int8" or "int4"; None for "full".

        Raises:
            CachepressError: for another name.
        """
        if isinstance(storage, Codec):
            return storage
        if storage not in STORAGES:
            raise CachepressError(f"storage: got {storage!r}, wanted one of {', '.join(STORAGES)}")
        return None if storage == "full" else cls(int(storage[3:]))

    def encode_keys(self, pages: Tensor, used: Tensor) -> "Quantized":
        """Pages ``[P, C, D]`` with a scale for each channel of a page.

        ``used [P, C]`` says which slots count.
        """
        self.check(pages.shape[-1])
        hidden = ~used.unsqueeze(-1)
        low = pages.float().masked_fill(hidden, float("inf")).amin(1, keepdim=True)
        high = pages.float().masked_fill(hidden, float("-inf")).amax(1, keepdim=True)
        return self._encode(pages, low, high)

    def encode_values(self, pages: Tensor) -> "Quantized":
        """Pages ``[P, C, E]`` with a scale for each row."""
        self.check(pages.shape[-1])
        low, high = (f(pages.float(), dim=-1, keepdim=True) for f in (torch.amin, torch.amax))
        return self._encode(pages, low, high)

    def row_bytes(self, key_size: int, value_size: int) -> float:
        """Bytes of a row of a head, its share of the scales included."""
        numbers = (key_size + value_size) * self.bits / 8
        return numbers + 4 * key_size / PAGE + 4

    def check(self, size: int) -> None:
        """Raise unless vectors of this size can be packed."""
        if self.bits == 4 and size % 2:
            raise CachepressError(f"int4 storage packs pairs of channels: got {size} channels")

    def _encode(self, pages: Tensor, low: Tensor, high: Tensor) -> "Quantized":
        steps = 2**self.bits - 1
        zero = low.half()
        scale = ((high - zero.float()) / steps).clamp(min=1e-7).half()
        scale = torch.where(scale == 0, torch.full_like(scale, 1e-7), scale)
        codes = ((pages.float() - zero.float()) / scale.float()).round_().clamp_(0, steps)
        codes = codes.to(torch.uint8)
        if self.bits == 4:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        return Quantized(codes, scale, zero, self.bits, pages.dtype)


@dataclass(frozen=True)
class Quantized:
    """Pages of numbers in few bits.

    Attributes:
        codes: ``[P, C, D]`` uint8, or ``[P, C, D / 2]`` with two numbers in each.
        scale: float16, what a step is worth, ``[P, 1, D]`` or ``[P, C, 1]``.
        zero: float16, what code 0 stands for, in the shape of ``scale``.
        bits: of a number.
        dtype: what was encoded.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    dtype: torch.dtype

    def decode(self) -> Tensor:
        """The pages ``[P, C, D]``."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        return torch.addcmul(self.zero.float(), codes.float(), self.scale.float()).to(self.dtype)

    def pages(self, change: Callable[[Tensor], Tensor]) -> "Quantized":
        """The same with other pages: ``change`` is applied to everything ``[P, ...]``."""
        return replace(
            self, codes=change(self.codes), scale=change(self.scale), zero=change(self.zero)
        )

    def tensors(self) -> list[Tensor]:
        """Everything that is allocated."""
        return [self.codes, self.scale, self.zero]
