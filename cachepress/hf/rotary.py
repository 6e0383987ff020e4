"""Finds a layer's rotary embedding, and proves it on keys that the layer computed.

Models store, scale and lay out rotary embeddings in many ways. Instead of trusting a name or a
config, every known layout is tried on the layer's own unrotated keys until it gives the keys in the
cache, of every token. A layout that is wrong cannot pass, so that keys are never rotated wrongly in
silence.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cachepress.ops import wide, wide_dtype

CosSin = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(x, positions [B, n]) -> cos, sin [B, n, r]``, as a model's rotary module computes them."""

NOT_OF_TEXT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a module raises that takes something else than the positions of a text."""

_AT_ONCE = 1 << 21
"""Numbers of keys that are compared at once."""


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
        cos_sin: computes cosine and sine of the angles, ``[B, n, ...]``.
        neighbours: whether a pair is channels (2i, 2i + 1) rather than (i, i + r / 2).
        pick: which of the angles belong to the r / 2 pairs; some modules give each of them twice.
    """

    cos_sin: CosSin
    neighbours: bool
    pick: slice = field(default_factory=lambda: slice(None))

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
        pair = (t[..., self.pick] for t in self.cos_sin(x, positions))
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


class Found(NamedTuple):
    """A rotary embedding, and the submodule of attention whose output it rotates."""

    module: nn.Module
    rotary: NoRotary | PairRotary


def find_rotary(
    angles: Sequence[CosSin],
    outputs: Mapping[nn.Module, Tensor],
    query_heads: int,
    key: Tensor,
    rope: Tensor,
    valid: Tensor | None = None,
    likely: Found | None = None,
) -> Found | None:
    """Find the rotary embedding that makes a layer's keys from the output of one of its submodules.

    Args:
        angles: what the model's rotary modules compute.
        outputs: what the attention's submodules computed in this forward, in their order.
        query_heads: query heads of the layer.
        key: ``[B, H, n, D]`` keys of the forward as attention used them.
        rope: ``[B, n]`` positions that they are rotated to.
        valid: ``[B, n]`` which of them are proven; None for all.
        likely: what is tried first.

    Returns:
        The embedding, or None when no known layout gives all of these keys.
    """
    at = slice(None, None, max(1, key.shape[2] // 8))
    proof = _Proof(key, rope, valid)
    few = proof.of(at)
    order = [] if likely is None or likely.module not in outputs else [likely.module]
    order += [module for module in reversed(list(outputs)) if module not in order]
    first = [] if likely is None else [likely.rotary]
    for module in order:
        for raw in _raw_keys(outputs[module], query_heads, key.shape):
            some = wide(raw[:, :, at])
            for rotary in chain(first, _candidates(angles, some, few.rope)):
                if not bool(few.equals(rotary(some, few.rope))) or not proof.gives(rotary, raw):
                    continue
                if isinstance(rotary, NoRotary) and outputs[module].ndim == 4:
                    flat = (out for out in outputs.values() if out.ndim == 3)
                    bare = (x for out in flat for x in _raw_keys(out, query_heads, key.shape))
                    if not _comes_first(module, (x[:, :, at] for x in bare), few):
                        continue
                return Found(module, rotary)
    return None


class _Proof:
    """Compares keys ``[B, H, n, D]`` with what rotary embeddings make of unrotated ones."""

    def __init__(self, key: Tensor, rope: Tensor, valid: Tensor | None) -> None:
        self.key, self.rope, self.valid = key, rope, valid
        self._tolerance = 1e-3 if key.dtype == wide_dtype(key) else 3e-2

    def of(self, tokens: slice) -> "_Proof":
        """Restrict the proof to some of the tokens."""
        valid = None if self.valid is None else self.valid[:, tokens]
        return _Proof(self.key[:, :, tokens], self.rope[:, tokens], valid)

    def gives(self, rotary: NoRotary | PairRotary, raw: Tensor) -> bool:
        """Tell whether an embedding makes all of the keys from ``raw``, some at a time."""
        b, h, n, d = self.key.shape
        step, alike = max(1, _AT_ONCE // (b * h * d)), []
        for start in range(0, n, step):
            part = slice(start, start + step)
            alike.append(self.of(part).equals(rotary(wide(raw[:, :, part]), self.rope[:, part])))
        return bool(torch.stack(alike).all())

    def equals(self, found: Tensor) -> Tensor:
        """Tell, as a tensor, whether keys are all equal; where one is not finite, both must not be.

        Each is compared by its own size, so that one huge key cannot hide that the others differ.
        """
        wanted = wide(self.key)
        lost = ~wanted.isfinite().all(-1)
        close = (found - wanted).abs().amax(-1) <= self._tolerance * wanted.abs().amax(-1)
        alike = torch.where(lost, ~found.isfinite().all(-1), close)
        return (alike if self.valid is None else alike | ~self.valid[:, None]).all()


def _comes_first(norm: nn.Module, bare: Iterable[Tensor], proof: _Proof) -> bool:
    """Tell whether a norm of heads, whose output a layer's keys are, was given unrotated ones.

    A norm may follow the rotary embedding, and the layer then seems to have none. Where it has none
    the norm makes these keys of what is ``bare`` of any embedding: the output of a projection.
    """
    for raw in bare:
        for heads in (1, 2):
            try:
                again = norm.forward(raw.transpose(1, heads)).transpose(1, heads)
            except NOT_OF_TEXT:
                continue
            if again.shape == proof.key.shape and bool(proof.equals(wide(again))):
                return True
    return False


def _candidates(
    angles: Sequence[CosSin], x: Tensor, rope: Tensor
) -> Iterator[NoRotary | PairRotary]:
    yield NoRotary()
    for cos_sin in angles:
        try:
            width = cos_sin(x, rope)[0].shape[-1]
        except NOT_OF_TEXT:
            continue
        for pick in (slice(None, width // 2), slice(None, None, 2), slice(None)):
            pairs = len(range(width)[pick])
            if 2 * pairs <= x.shape[-1]:
                for neighbours in (False, True):
                    yield PairRotary(cos_sin, neighbours, pick)


def _raw_keys(out: Tensor, query_heads: int, shape: torch.Size) -> Iterator[Tensor]:
    """Read an output in every way as unrotated keys ``[B, H, n, D]`` of this shape.

    A submodule may compute keys alone, or queries, keys and values in one matrix.
    """
    b, h, n, d = shape
    if out.shape == shape:
        yield out
    if out.shape == (b, n, h, d):
        yield out.transpose(1, 2)
    if out.ndim != 3 or out.shape[:2] != (b, n):
        return
    width, groups = out.shape[-1], query_heads // h
    if width == h * d:
        yield out.reshape(b, n, h, d).transpose(1, 2)
    start = query_heads * d
    if width >= start + h * d:
        yield out[..., start : start + h * d].reshape(b, n, h, d).transpose(1, 2)
    if width == 3 * h * d:
        yield out.reshape(b, n, h, 3 * d)[..., d : 2 * d].transpose(1, 2)
    if width == h * (groups + 2) * d:
        yield out.reshape(b, n, h, groups + 2, d)[..., groups, :].transpose(1, 2)
