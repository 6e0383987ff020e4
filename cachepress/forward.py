"""What one attention call of one layer shows.

Shape letters are explained in ``cachepress.view``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cachepress.cache.pairs import Pairs
from cachepress.ops import AttentionRule
from cachepress.view import Rotary


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
    rows: Pairs
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
