"""How far two results may be apart that are the same but for rounding.

Algebra is checked in float64, where 1e-9 is far above what rounding does and far below what a
fault does. What is about another type has a bound that follows from the type.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from cachepress import budgets
from cachepress.budgets import Threshold

EXACT = 1e-9
"""The most that two float64 results differ by, relative to their size where that is above 1."""


def close(ours: Tensor | np.ndarray, wanted: Tensor | np.ndarray) -> None:
    """Assert that two float64 results are the same but for the order of their sums."""
    ours, wanted = torch.as_tensor(ours), torch.as_tensor(wanted)
    assert (ours.dtype, wanted.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(ours, wanted, atol=EXACT, rtol=EXACT, equal_nan=True)


def rounding(dtype: torch.dtype, terms: int, depth: int = 1) -> float:
    """How far two results of ``dtype`` may be apart, relative to what was summed up for them.

    A sum of n terms errs by n units of roundoff of the sum of their sizes, whatever its order
    (Higham, Accuracy and Stability of Numerical Algorithms, 2002, 4.2); a unit is half of epsilon,
    two results err twice, and every one of ``depth`` layers adds what it errs by.

    Args:
        dtype: the type that is computed in.
        terms: numbers in the sums of a layer, one after the other.
        depth: layers.
    """
    return torch.finfo(dtype).eps * terms * depth


def near(
    ours: Tensor | np.ndarray,
    wanted: Tensor | np.ndarray,
    dtype: torch.dtype,
    terms: int,
    depth: int = 1,
) -> None:
    """Assert that results are the same but for ``rounding``, by the size of the largest."""
    ours, wanted = (torch.as_tensor(x).double() for x in (ours, wanted))
    size = float(wanted[wanted.isfinite()].abs().max())
    assert size < 1e30, "pinned scores are no measure"
    bound = rounding(dtype, terms, depth) * max(1.0, size)
    torch.testing.assert_close(ours, wanted, atol=bound, rtol=0, equal_nan=True)


def half_a_step(x: Tensor, dim: int, bits: int) -> Tensor:
    """How far numbers in few bits may be off, with ``x`` along ``dim`` in one range.

    Half of a step; what float16 makes of the step and of the lowest number; and what float32 makes
    of the sum of the two. A range that is wider than the one that was used only widens it.
    """
    half, steps = torch.finfo(torch.float16), 2**bits - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    least = half.smallest_normal * half.eps / 2  # Half of the distance of the smallest numbers.
    scales = (steps + 1) * least + half.eps / 2 * (high - low + low.abs())
    sums = 4 * rounding(torch.float32, 1) * x.abs().amax(dim, keepdim=True)
    return (high - low) / steps / 2 + scales + sums


def margin(scores: Tensor, valid: Tensor, mask: Tensor) -> Tensor:
    """The lowest score that stays less the highest that does not, by their size, ``[B, H]``.

    Infinite where all pairs stay or none; 0 for scores that are equal to the last bit, of which
    the newest stay.
    """
    scores = scores.double()
    last = scores.masked_fill(~(valid & mask), float("inf")).amin(-1)
    first = scores.masked_fill(~valid | mask, float("-inf")).amax(-1)
    gap = (last - first) / torch.maximum(last.abs(), first.abs())
    gap = gap.masked_fill(last.isinf() | first.isinf(), float("inf"))
    return gap.masked_fill(last == first, 0)


@contextmanager
def no_near_ties(least: float = EXACT) -> Iterator[None]:
    """Assert within the block that no choice of pairs hangs on rounding.

    Every choice of the highest scores, and every comparison with a threshold, must have a margin,
    or be between scores that are equal to the last bit.
    """
    best, select = budgets.best, Threshold.select

    def checked_best(scores: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
        mask = best(scores, valid, counts)
        gap = margin(scores.nan_to_num(nan=float("-inf")), valid, mask)
        close_by = gap[(gap != 0) & ~(gap > least)]
        assert not len(close_by), f"a choice hangs on {close_by.tolist()}"
        return mask

    def checked_select(self: Threshold, scores: Tensor, valid: Tensor, n: Tensor) -> Tensor:
        gap = (scores - self.least)[valid].abs()
        clear = (gap == 0) | (gap > least * max(1.0, abs(self.least)))
        assert bool(clear.all()), "a comparison with a threshold hangs on rounding"
        return select(self, scores, valid, n)

    places = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("cachepress.") and getattr(module, "best", None) is best
    ]
    for module in places:
        module.best = checked_best
    Threshold.select = checked_select
    try:
        yield
    finally:
        for module in places:
            module.best = best
        Threshold.select = select


@contextmanager
def no_close_answers(terms: int = 1, depth: int = 1) -> Iterator[None]:
    """Assert within the block that no token of an answer hangs on rounding.

    Wherever the most likely token is taken, the second one must be further away than rounding can
    move the two, or have the same logit to the last bit.

    Args:
        terms: numbers that are summed in the type of the logits in a layer; 1 of float64 models,
            of which ``generate()`` takes the logits as float32.
        depth: layers.
    """
    free, method = torch.argmax, torch.Tensor.argmax

    def check(logits: Tensor) -> None:
        if not logits.is_floating_point() or logits.ndim == 0 or logits.shape[-1] < 2:
            return
        first, second = logits.detach().topk(2, dim=-1).values.double().unbind(-1)
        size = logits.detach().double().nan_to_num(0, 0, 0).abs().amax(-1)
        bound = 2 * rounding(logits.dtype, terms, depth) * size.clamp(min=1)
        close_by = (first - second)[(first != second) & (first - second <= bound)]
        assert not len(close_by), f"a token hangs on {close_by.tolist()}"

    def checked(x: Tensor, *args: object, **options: object) -> Tensor:
        check(x)
        return free(x, *args, **options)

    torch.argmax = torch.Tensor.argmax = checked
    try:
        yield
    finally:
        torch.argmax, torch.Tensor.argmax = free, method
