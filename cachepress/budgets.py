"""Budgets: how many pairs are kept, and which of them compete with each other.

An amount (``Ratio``, ``Fixed``, ``Bytes``, ...) is a number of pairs in the user's unit; a budget
(``TopK``, ``Threshold``) turns scores into a keep mask. Neither scores anything itself.
"""

import re
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from math import ceil, floor
from typing import Protocol

import torch
from torch import Tensor

from cachepress.errors import CachepressError
from cachepress.limits import LONGEST_SHOWN, MOST_BYTES, shown
from cachepress.ops import wide
from cachepress.ops.paged_attention import PAGE
from cachepress.ranks import FREE, TAKEN, best
from cachepress.view import LayerView

SCOPES = ("head", "layer", "model")
_PAGE_INDEX, _SPAN_INDEX = 16, PAGE * 4 + 24
"""Bytes of the index of uneven heads, for each page and for each head."""
_EXACT = 2**32
"""Numerators that can be multiplied by any number of tokens in 64 bits."""
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}


class Budget(Protocol):
    """Says how many pairs are kept, and chooses them by their scores."""

    @property
    def scope(self) -> str:
        """Which pairs compete: those of a "head", of a "layer" or of the whole "model"."""
        ...

    def count(self, view: LayerView) -> Tensor:
        """Compute how many pairs each head keeps, ``[B]``, on average where heads compete.

        ``[B, H]`` where heads have numbers of their own.
        """
        ...

    def holds_all(self, valid: Tensor, n_kept: Tensor) -> bool:
        """Whether no pair is evicted, whatever the scores."""
        ...

    def select(self, scores: Tensor, valid: Tensor, n_kept: Tensor) -> Tensor:
        """Choose the pairs with the highest ``scores [B, H, T]``, as a keep mask ``[B, H, T]``.

        ``valid [B, H, T]`` are the pairs that may be kept, ``n_kept`` is what ``count`` returned.
        """
        ...


class Amount(Protocol):
    """A number of pairs, in the user's unit: a ratio, a number or bytes."""

    def pairs(self, view: LayerView) -> Tensor:
        """Compute the number of pairs for each head of a layer, ``[B]``."""
        ...


@dataclass(frozen=True)
class Ratio:
    """The number that a compression ratio leaves of the tokens seen: floor(seen * (1 - ratio)).

    It counts all tokens seen, evicted ones included: one forward, chunks and a later prompt end
    with the same number of pairs.

    Attributes:
        ratio: 0 <= ratio < 1, taken as the exact decimal that it is written as.
    """

    ratio: float

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def pairs(self, view: LayerView) -> Tensor:
        """Compute the number of pairs for each head, ``[B]``."""
        kept = 1 - Fraction(str(self.ratio))
        if kept.numerator < _EXACT:  # A device computes them, and is not waited for.
            return view.n_seen * kept.numerator // kept.denominator
        counts = [floor(n * kept) for n in view.n_seen.flatten().tolist()]
        return torch.tensor(counts, device=view.n_seen.device).view_as(view.n_seen)


@dataclass(frozen=True)
class Fixed:
    """The same number of pairs for every text, however long.

    Attributes:
        n: pairs of each head.
    """

    n: int

    def pairs(self, view: LayerView) -> Tensor:
        """Compute the number of pairs for each head, ``[B]``: the tokens seen, at most ``n``."""
        return view.n_seen.clamp(max=self.n)


@dataclass(frozen=True)
class Bytes:
    """As many pairs as fit into a number of bytes, allocated for the whole cache.

    The bytes are those of all compressed layers and all sequences, with unused memory and positions
    included, right after compression; and while tokens are decoded after it, if there is ``room``
    for them.

    Attributes:
        limit: bytes.
        uneven: whether heads keep different numbers, each with a last page that is not full.
        room: tokens that are decoded before the cache is compressed again.
        most: number of pairs that no head exceeds, whatever fits; None for no such number.
    """

    limit: int
    uneven: bool = False
    room: int = 0
    most: Amount | None = None

    def pairs(self, view: LayerView) -> Tensor:
        """Compute the number of pairs for each head, ``[B]``, on average.

        Raises:
            CachepressError: if not even one pair for each head fits.
        """
        b, h = view.keys.shape[:2]
        heads = b * h * view.n_layers
        each, fixed = view.pair_bytes.each, view.pair_bytes.fixed
        fixed += view.pair_bytes.decoded(self.room) if self.room else 0
        if self.uneven or len(view.n_seen.unique()) > 1:
            fixed += _SPAN_INDEX + _PAGE_INDEX * (PAGE - 1) / PAGE
            each += _PAGE_INDEX / PAGE
        if self.uneven:
            fixed += (PAGE - 1) * view.pair_bytes.each
        step = 1 if self.uneven else PAGE
        # The nudge is far above the rounding of a double, and far below a pair.
        pairs = floor((self.limit / heads - fixed) / (each * step) + 1e-9) * step
        if pairs < 1:
            raise CachepressError(
                f"max_bytes: got {self.limit}, wanted at least "
                f"{ceil(heads * (fixed + step * each))} for {view.n_layers} layers of {b} "
                f"sequences and {h} KV heads: pairs are allocated by {PAGE}"
                + (f", and {self.room} more are decoded" if self.room else "")
            )
        found = view.n_seen.clamp(max=pairs)
        return found if self.most is None else found.minimum(self.most.pairs(view))


@dataclass(frozen=True)
class PerLayer:
    """A compression ratio of its own for every layer.

    Attributes:
        ratios: by rank among the layers that are compressed.
    """

    ratios: tuple[float, ...]

    def pairs(self, view: LayerView) -> Tensor:
        """Compute the number of pairs for each head, ``[B]``."""
        return Ratio(self.ratios[view.depth]).pairs(view)


@dataclass(frozen=True)
class Pyramid:
    """More pairs for the first layers, fewer for the last, the same in total.

    The number falls linearly from layer to layer. The last layer gets ``1 / beta`` of the average,
    but at least the tokens of its window.

    Attributes:
        amount: the average.
        window: tokens of the window.
        beta: how steep the pyramid is.
    """

    amount: Amount
    window: int
    beta: int

    def pairs(self, view: LayerView) -> Tensor:
        """Compute the number of pairs for each head, ``[B]``."""
        average, seen = self.amount.pairs(view).flatten(), view.n_seen.flatten()
        pairs = zip(average.tolist(), seen.tolist(), strict=True)
        counts = [self._of_layer(n, seen, view.depth, view.n_layers) for n, seen in pairs]
        return torch.tensor(counts, device=view.n_seen.device).view_as(view.n_seen)

    def _of_layer(self, average: int, seen: int, depth: int, n_layers: int) -> int:
        if n_layers == 1 or average >= seen:
            return average
        if isinstance(self.amount, Bytes) and not self.amount.uneven and not average % PAGE:
            # Every layer would round up to whole pages, and all of them exceed the limit.
            pages = self._shared(average // PAGE, -(-seen // PAGE), PAGE, depth, n_layers)
            return min(pages * PAGE, seen)
        return self._shared(average, seen, 1, depth, n_layers)

    def _shared(self, average: int, seen: int, unit: int, depth: int, n_layers: int) -> int:
        """Compute a layer's share of the pairs, in the ``unit`` of ``average`` and ``seen``.

        It is computed in exact fractions, so that all layers together get what the user said.
        """
        least = max(Fraction(average, self.beta), Fraction(self.window, unit), Fraction(1))
        least = min(Fraction(average), least)
        most = min(2 * average - least, Fraction(seen))
        step = 2 * (most - average) / (n_layers - 1)

        def total(layers: int) -> int:
            """Count the pairs of the first ``layers``, rounded in sum so that no pair is lost."""
            return floor(layers * most - step * (layers * (layers - 1) // 2))

        return total(depth + 1) - total(depth)


@dataclass(frozen=True)
class TopK:
    """Keeps the pairs with the highest scores among those that compete.

    Attributes:
        amount: pairs that each head keeps, on average where heads compete; at least one for each
            group of pairs that compete.
        scope: whether the pairs of a "head", a "layer" or the whole "model" compete.
        floor: fraction of the average that every head keeps, whatever its scores.
    """

    amount: Amount
    scope: str = "head"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise CachepressError(f"scope: got {self.scope!r}, wanted one of {', '.join(SCOPES)}")

    def count(self, view: LayerView) -> Tensor:
        """Compute how many pairs each head keeps, ``[B]``, on average where heads compete."""
        if self.scope == "head":
            return self.amount.pairs(view).clamp(min=1)
        return with_bytes(self.amount, uneven=True).pairs(view)

    def holds_all(self, valid: Tensor, n_kept: Tensor) -> bool:
        """Whether every pair can be kept."""
        pairs = valid.sum(-1)  # [B, H]
        counts = n_kept.view(len(n_kept), -1).expand_as(pairs)
        if self.scope == "head":
            return bool((counts >= pairs).all())
        return bool((counts.sum(-1) >= pairs.sum(-1)).all())

    def select(self, scores: Tensor, valid: Tensor, n_kept: Tensor) -> Tensor:
        """Choose the pairs to keep, ``[B, H, T]``; of equal scores the newest are kept.

        ``n_kept`` may also be ``[B, H]``, a number for each head.
        """
        counts = n_kept.double().view(len(n_kept), -1, 1)  # [B, 1 or H, 1]
        if self.scope == "head":
            return best(scores, valid, counts)
        safe = best(scores, valid, floor_of(counts, self.floor))
        everything = wide(scores).masked_fill(safe, float("inf")).flatten(1)[:, None]
        total = counts.expand(-1, scores.shape[1], -1).sum(1, keepdim=True).round().clamp(min=1)
        return best(everything, valid.flatten(1)[:, None], total).view_as(valid)


def bytes_of(amount: Amount) -> Bytes | None:
    """Return the ``Bytes`` that an amount is made from; None if it is made from none."""
    if isinstance(amount, Bytes):
        return amount
    found = (bytes_of(inner) for parts in _inner(amount).values() for inner in parts)
    return next((limit for limit in found if limit is not None), None)


def with_bytes(amount: Amount, uneven: bool) -> Amount:
    """Return the amount with its ``Bytes``, if it has any, for heads of even or uneven lengths."""
    if isinstance(amount, Bytes):
        most = None if amount.most is None else with_bytes(amount.most, uneven)
        return replace(amount, uneven=uneven, most=most)
    changed: dict[str, object] = {}
    for name, parts in _inner(amount).items():
        new = tuple(with_bytes(part, uneven) for part in parts)
        changed[name] = new if isinstance(getattr(amount, name), tuple) else new[0]
    return replace(amount, **changed) if changed else amount  # pyright: ignore[reportArgumentType]


def _inner(amount: Amount) -> dict[str, tuple[Amount, ...]]:
    """Find the amounts that an amount is made from, by the names of its fields."""
    found: dict[str, tuple[Amount, ...]] = {}
    for field in fields(amount):  # pyright: ignore[reportArgumentType]
        value = getattr(amount, field.name)
        parts = value if isinstance(value, tuple) else (value,)
        if parts and all(hasattr(part, "pairs") for part in parts):
            found[field.name] = parts
    return found


@dataclass(frozen=True)
class Threshold:
    """Keeps every pair whose score is high enough, however many; if none is, the newest one.

    Attributes:
        least: the lowest score that is kept.
        scope: "head": pairs of different heads do not compete.
    """

    least: float
    scope: str = "head"

    def count(self, view: LayerView) -> Tensor:
        """Return the number of tokens seen, ``[B]``: all of them may be kept."""
        return view.n_seen

    def holds_all(self, valid: Tensor, n_kept: Tensor) -> bool:
        """Return False: without the scores it is not known."""
        return False

    def select(self, scores: Tensor, valid: Tensor, n_kept: Tensor) -> Tensor:
        """Choose the pairs to keep, ``[B, H, T]``."""
        mask = valid & (scores >= self.least)
        newest = valid & (valid.flip(-1).cumsum(-1).flip(-1) == 1)
        return torch.where(mask.any(-1, keepdim=True), mask, newest)


CHOSEN = Threshold((FREE + TAKEN) / 2)
"""For scores in which the pairs to keep were chosen already, by ``choose``."""


def apportion(weights: Tensor, total: int, least: int, most: int) -> Tensor:
    """Divide ``total`` into whole numbers in proportion to ``weights [X]``, by largest remainder.

    Each is at least ``least`` and at most ``most``, and the others share what that changes; so the
    sum is ``least * X`` or ``most * X`` where ``total`` is out of their reach.
    """
    weights, x = weights.double().cpu().clamp(min=1e-12), len(weights)
    total = min(max(total, least * x), most * x)
    low, high = 0.0, (most + 1) / float(weights.min())
    for _ in range(200):
        middle = (low + high) / 2
        if float((weights * middle).clamp(least, most).sum()) < total:
            low = middle
        else:
            high = middle
    exact = (weights * high).clamp(least, most)
    counts = (exact + 1e-9).floor()
    missing = total - int(counts.sum())
    order = (exact - counts).masked_fill(counts >= most, -1.0).argsort(descending=True, stable=True)
    counts[order[:missing]] += 1
    return counts.long()


def floor_of(counts: Tensor, fraction: float) -> Tensor:
    """Compute floor(counts * fraction), with the fraction taken as the decimal it is written as."""
    # Nine decimals are exact; more would leave the 64 bits of the product.
    exact = Fraction(str(fraction)).limit_denominator(10**9)
    # The nudge is far above the rounding of a double and far below one part of the denominator.
    return (counts * exact.numerator / exact.denominator + 1e-9).floor()


def check_ratio(ratio: float, name: str = "compression_ratio") -> None:
    """Raise CachepressError unless ``ratio`` is a number with 0 <= ratio < 1."""
    if not _is_number(ratio) or not 0 <= ratio < 1:
        raise CachepressError(
            f"{name} is the fraction of pairs removed: got {shown(ratio)}, wanted a number from 0 "
            "up to but not including 1"
        )


def check_fraction(fraction: float, name: str) -> None:
    """Raise CachepressError unless ``fraction`` is a number with 0 <= fraction <= 1."""
    if not _is_number(fraction) or not 0 <= fraction <= 1:
        raise CachepressError(f"{name}: got {shown(fraction)}, wanted a number from 0 to 1")


def parse_bytes(text: str | int) -> int:
    """Read a number of bytes, such as 1048576, "512MB" or "1.5GiB".

    Raises:
        CachepressError: if it is not a number of bytes above 0.
    """
    spelled = text if isinstance(text, str) else shown(text)
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", spelled[:LONGEST_SHOWN])
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or isinstance(text, bool) or not Fraction(found[1]):
        raise CachepressError(
            f'max_bytes: got {shown(text)}, wanted a number of bytes such as 500000000 or "1.5GiB"'
        )
    n_bytes = floor(Fraction(found[1]) * unit)
    if n_bytes > MOST_BYTES:
        raise CachepressError(f"max_bytes: got {shown(text)}, wanted at most {MOST_BYTES} bytes")
    return n_bytes


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
