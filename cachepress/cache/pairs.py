"""Key-value pairs of one layer at one moment, as a table, and what they cost in bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Key-value pairs of one layer at one moment: what attention reads and a press scores.

    Attributes:
        keys: ``[B, H, T, D]``.
        values: ``[B, H, T, E]``.
        positions: ``[B, H, T]`` index in the text, -1 in an empty slot; None when pair t of every
            head is text column t.
        full: whether no slot is empty.
        rope: ``[B, H, T]`` position that each key is rotated to; None where it is the position.
        token_state: ``[B, H, T]`` a number that a press keeps with each token, NaN for none; None
            where no token has one.
        bias: ``[B, H, T]`` a number that is added to the logits of each pair; None for 0.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    full: bool = True
    rope: Tensor | None = None
    token_state: Tensor | None = None
    bias: Tensor | None = None

    def text_positions(self) -> Tensor:
        """Return positions ``[B, H, T]``: the text columns 0, 1, 2, ... where none are stored."""
        if self.positions is not None:
            return self.positions
        b, h, t, _ = self.keys.shape
        return torch.arange(t, dtype=torch.int32, device=self.keys.device).expand(b, h, t)


class PairBytes(NamedTuple):
    """Bytes that the kept pairs of a head need.

    Attributes:
        each: bytes of a pair.
        fixed: bytes that do not depend on the number of pairs.
        decoded: the most bytes for a number of tokens that are decoded after it.
    """

    each: float
    fixed: float
    decoded: Callable[[int], float] = float
