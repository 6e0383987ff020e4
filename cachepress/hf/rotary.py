"""Finds a layer's rotary embedding, and proves it on keys that the layer computed.

Models store, scale and lay out rotary embeddings in many ways. Instead of trusting a name or a
config, every known layout is tried on the layer's own unrotated keys until it gives the keys in the
cache. A layout that is wrong cannot pass, so that keys are never rotated wrongly in silence.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.ops import wide, wide_dtype

CosSin = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(x, positions [B, n]) -> cos, sin [B, n, r]``, as a model's rotary module computes them."""


@dataclass(frozen=True)
class NoRotary:
    """The position embedding of a layer whose attention has none: the identity."""

    def __call__(self, x: Tensor, positions: Tensor, *, inverse: bool = False) -> Tensor:
        """Return ``x``."""
        return x

    def mean(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return ``x``."""
        return x


@dataclass(frozen=True)
class PairRotary:
    """A rotary embedding of pairs of channels: neighbours, or one of each half.

    Attributes:
        cos_sin: computes cosine and sine of the angles, one per pair, ``[B, n, r / 2]``.
        neighbours: whether a pair is channels (2i, 2i + 1) rather than (i, i + r / 2).
    """

    cos_sin: CosSin
    neighbours: bool

    def __call__(self, x: Tensor, positions: Tensor, *, inverse: bool = False) -> Tensor:
        """Rotate ``x [B, ..., n, D]`` to ``positions [B, n]``, or back from them."""
        cos, sin = self._angles(x, positions, x.ndim - 3)
        if inverse:
            # Some embeddings scale as they rotate (YaRN), which the inverse has to undo.
            length = cos.square() + sin.square()
            cos, sin = cos / length, -sin / length
        return self._rotated(x, cos, sin)

    def mean(self, x: Tensor, positions: Tensor) -> Tensor:
        """Average ``x [B, ..., D]`` rotated to each of ``positions [B, n]``."""
        cos, sin = self._angles(x, positions, x.ndim - 2)
        return self._rotated(x, cos.mean(-2), sin.mean(-2))

    def _angles(self, x: Tensor, positions: Tensor, inner: int) -> tuple[Tensor, Tensor]:
        pair = self.cos_sin(x, positions)
        cos, sin = (t.view(t.shape[0], *[1] * inner, *t.shape[1:]) for t in pair)
        return cos, sin

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        r = 2 * cos.shape[-1]
        part, rest = x[..., :r], x[..., r:]
        if self.neighbours:
            a, b = part[..., 0::2], part[..., 1::2]
            rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = part.chunk(2, dim=-1)
            rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return torch.cat([rotated, rest], dim=-1)


def find_rotary(
    modules: Iterable[CosSin], outputs: list[Tensor], query_heads: int, key: Tensor, rope: Tensor
) -> NoRotary | PairRotary | None:
    """Find the rotary embedding that makes a layer's keys from the output of one of its submodules.

    Args:
        modules: the model's rotary modules.
        outputs: what the attention's submodules computed in this forward.
        query_heads: query heads of the layer.
        key: ``[B, H, n, D]`` keys of the forward as attention used them.
        rope: ``[B, n]`` positions that they are rotated to.

    Returns:
        The embedding, or None when no known layout gives these keys.
    """
    # Some eight tokens all over the forward: those far from its start tell scalings apart.
    probe = slice(None, None, max(1, key.shape[2] // 8))
    target, rope = wide(key[:, :, probe]), rope[:, probe]
    tolerance = 1e-3 if key.dtype == wide_dtype(key) else 3e-2
    modules = list(modules)
    for raw in _raw_keys(outputs, query_heads, key):
        unrotated = wide(raw[:, :, probe])
        for rotary in _candidates(modules, unrotated, rope):
            if _alike(rotary(unrotated, rope), target, tolerance):
                return rotary
    return None


def _alike(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Tell whether vectors ``[..., D]`` are equal; where one is not finite, both must not be.

    Each is compared by its own size, so that one huge vector cannot hide that the others differ.
    """
    lost = ~wanted.isfinite().all(-1)
    close = (found - wanted).abs().amax(-1) <= tolerance * wanted.abs().amax(-1)
    return bool(torch.where(lost, ~found.isfinite().all(-1), close).all())


def _candidates(modules: list[CosSin], x: Tensor, rope: Tensor) -> Iterator[NoRotary | PairRotary]:
    yield NoRotary()
    for module in modules:
        try:
            width = module(x, rope)[0].shape[-1]
        except (IndexError, RuntimeError, ValueError):
            continue  # It takes other positions than those of a text.
        for pick in (slice(None, width // 2), slice(None, None, 2), slice(None)):
            pairs = len(range(width)[pick])
            if 2 * pairs <= x.shape[-1]:
                for neighbours in (False, True):
                    yield PairRotary(_picked(module, pick), neighbours)


def _picked(module: CosSin, pick: slice) -> CosSin:
    def cos_sin(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = module(x, positions)
        return cos[..., pick], sin[..., pick]

    return cos_sin


def _raw_keys(outputs: list[Tensor], query_heads: int, key: Tensor) -> Iterator[Tensor]:
    """Read the outputs in every way as unrotated keys ``[B, H, n, D]``, the latest output first.

    A submodule may compute keys alone, or queries, keys and values in one matrix.
    """
    b, h, n, d = key.shape
    for out in reversed(outputs):
        if out.shape == key.shape:
            yield out
        if out.shape == (b, n, h, d):
            yield out.transpose(1, 2)
        if out.ndim != 3 or out.shape[:2] != (b, n):
            continue
        width = out.shape[-1]
        if width == h * d:
            yield out.view(b, n, h, d).transpose(1, 2)
        start = query_heads * d
        if width >= start + h * d:
            yield out[..., start : start + h * d].view(b, n, h, d).transpose(1, 2)
        if width == 3 * h * d:
            yield out.view(b, n, h, 3 * d)[..., d : 2 * d].transpose(1, 2)
