"""CaM: values evicted while decoding are merged into the tokens after them."""

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from cachepress.checks import check_count
from cachepress.press import BasePress
from cachepress.presses._checks import either, fill
from cachepress.presses.decoding import DecodingPress
from cachepress.presses.random import RandomPress
from cachepress.view import LayerView, Needs

_STREAM = 0x43614D
"""Keeps the draws apart from those of a RandomPress inside."""


@dataclass(frozen=True)
class CAMPress(DecodingPress, alias="cam"):
    """Merges the values of tokens evicted while decoding into the kept tokens after them.

    Zhang et al., "CaM: Cache Merging for Memory-efficient LLMs Inference" (ICML 2024, openreview
    LCTmppB165). A ``DecodingPress``; the merge window of an evicted token is the next
    ``merge_budget`` kept tokens of its head, fewer at the end of the text. With probability
    ``min(1, a / mean of a over the window)`` each of them gets an equal share of its value, by a
    draw that depends on the seed, the layer, the head and the token's index only. As in the paper
    ``a`` is the attention that a token received in total, whatever the inner press scores by; the
    mean of the query heads of a KV head, the prompt's queries included, and of the decoded ones
    those that the buffer holds. It is kept with each token, unless the inner press keeps a state of
    its own: then ``a`` counts the queries since the last compression. ``compression_interval=1`` is
    the paper's algorithm, which evicts a token with every decoded one; with more, all tokens that
    are evicted at once are merged. Needs what the inner press needs, the attention sums, and 4
    bytes with each pair (8 in float64).
    Best for small targets, where much attention falls on tokens that are evicted.

    Attributes:
        press: the press that scores; its own ratio does not count.
        compression_interval: decoded tokens between two compressions.
        target_size: pairs that each head keeps, on average where heads compete.
        hidden_states_buffer_size: most decoded queries that a score can use.
        merge_budget: kept tokens that share the value of an evicted one.
        seed: another seed gives other draws.
    """

    merge_budget: int = 32
    seed: int = 0

    def __init__(
        self,
        press: BasePress | None = None,
        compression_interval: int = 512,
        target_size: int = 2048,
        hidden_states_buffer_size: int = 256,
        merge_budget: int = 32,
        seed: int = 0,
        *,
        base_press: BasePress | None = None,
    ) -> None:
        """Take ``base_press``, kvpress's name, for ``press``, too."""
        values = {
            "press": either("press", press, "base_press", base_press),
            "compression_interval": compression_interval,
            "target_size": target_size,
            "hidden_states_buffer_size": hidden_states_buffer_size,
            "merge_budget": merge_budget,
            "seed": seed,
        }
        fill(self, values)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "merge_budget")
        check_count(self, "seed", least=0)

    @property
    def needs(self) -> Needs:
        """What the inner press needs, and the attention received by each token so far."""
        return super().needs | Needs(attention_sums=True, token_state=True)

    def token_state(self, view: LayerView) -> Tensor | None:
        """The inner press's state of each pair, or the attention received, ``[B, H, T]``."""
        return (
            self.press.token_state(view) if self.press.needs.token_state else self._received(view)
        )

    def merge(self, view: LayerView, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """Merge the shares of evicted values into kept ones; keys stay as they are."""
        merged, evicted = self.press.merge(view, mask), view.valid & ~mask
        if not bool(evicted.any()):
            return merged
        keys, values = (view.keys, view.values) if merged is None else merged
        values, received = values.clone(), self._received(view)
        draws = RandomPress(seed=self.seed + _STREAM).score(view)
        for b, h in product(*map(range, mask.shape[:2])):
            kept, gone = (x[b, h].nonzero()[:, 0] for x in (mask, evicted))
            self._share(values[b, h], received[b, h], draws[b, h], kept, gone)
        return keys, values

    def _share(
        self, values: Tensor, received: Tensor, draws: Tensor, kept: Tensor, gone: Tensor
    ) -> None:
        """Share out ``values [T, E]`` of the evicted ``gone [n]`` among ``kept [m]``, in place."""
        first = torch.searchsorted(kept, gone)  # [n], where the merge window begins in kept.
        reach = min(self.merge_budget, len(kept))
        size = (len(kept) - first).clamp(max=reach)
        so_far = F.pad(received[kept].double().cumsum(0), (1, 0))
        total = so_far[first + size] - so_far[first]
        odds = received[gone] * size / total.clamp(min=torch.finfo(torch.float32).tiny)
        some = (size > 0) & (draws[gone] < odds)
        shares = values[gone[some]].double() / size[some, None]
        # Windows overlap. Each share is entered once, where its window begins; the kept token at j
        # gets all that began at j - reach + 1 to j, a difference of two running sums. Windows
        # that are shorter end with the text, so the same difference is right for them.
        begun = shares.new_zeros(len(kept), values.shape[1]).index_add_(0, first[some], shares)
        so_far = F.pad(begun.cumsum(0), (0, 0, reach, 0))
        sums = so_far[reach:] - so_far[: len(kept)]
        values[kept] = (values[kept].double() + sums).to(values.dtype)
        values[gone[some]] = 0

    def _received(self, view: LayerView) -> Tensor:
        """Sum the attention received so far, ``[B, H, T]``."""
        if view.attention_sums is None:
            raise TypeError("the view was made without attention sums")
        received = view.attention_sums.mean(2)
        if view.token_state is None or self.press.needs.token_state:
            return received
        return received + view.token_state.nan_to_num(nan=0.0)
