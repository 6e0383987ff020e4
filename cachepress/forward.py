"""What one attention call of one layer shows.

Shape letters are explained in ``cachepress.view``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.ops import AttentionRule
from cachepress.view import Rotary


@dataclass(frozen=True)
class Rows:
    """Rows of one layer at one moment: what attention reads and a press scores.

    Attributes:
        keys: ``[B, H, T, D]``.
        values: ``[B, H, T, E]``.
        positions: ``[B, H, T]`` index in the text, -1 in an empty slot; None when row t of every
            head is text column t.
        full: whether no slot is empty.
        rope: ``[B, H, T]`` position that each key is rotated to; None where it is the position.
        token_state: ``[B, H, T]`` a number that a press keeps with each token, NaN for none; None
            where no token has one.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    full: bool = True
    rope: Tensor | None = None
    token_state: Tensor | None = None

    def text_positions(self) -> Tensor:
        """Positions ``[B, H, T]``, written out."""
        if self.positions is not None:
            return self.positions
        b, h, t, _ = self.keys.shape
        return torch.arange(t, dtype=torch.int32, device=self.keys.device).expand(b, h, t)


@dataclass(frozen=True)
class Forward:
    """What one layer's attention call showed.

    Attributes:
        query: ``[B, H * G, n, D]`` as attention used it.
        rows: all rows, those of this forward last.
        text_valid: ``[B, S]`` bool, which text columns are tokens; None when all are.
        rope: ``[B, n]`` positions that this forward's tokens are rotated to.
        layer: index of the layer in the model.
        depth: rank of the layer among those that are compressed.
        n_layers: number of layers that are compressed.
        rule: how the layer turns products into weights.
        find_rotary: finds and verifies the layer's position embedding, or raises.
        find_projection: finds the layer's output projection ``[H, G, E, M]``, or raises.
        hidden: ``[B, n, M]`` hidden states that attention read; None where nobody asked.
        n_question: ``[B]`` tokens at the end of the text that are the question; None for none.
    """

    query: Tensor
    rows: Rows
    text_valid: Tensor | None
    rope: Tensor
    layer: int
    depth: int
    n_layers: int
    rule: AttentionRule
    find_rotary: Callable[[], Rotary]
    find_projection: Callable[[], Tensor]
    hidden: Tensor | None = None
    n_question: Tensor | None = None
