"""Which pairs stay when pins, ties and numbers out of range meet."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cachepress as cp
from cachepress.budgets import Ratio, TopK, apportion
from cachepress.cache.pairs import PairBytes
from cachepress.ops import AttentionRule
from cachepress.ranks import pin_sinks, pin_window
from cachepress.view import LayerView
from tests.tiny import exact_tiny as tiny
from tests.tiny import rand, tokens
from tests.tiny_cache import kept


def view(n, kept, pad=0):
    positions = torch.arange(n).view(1, 1, n)
    return LayerView(
        keys=torch.zeros(1, 1, n, 2),
        values=torch.zeros(1, 1, n, 2),
        positions=positions,
        index=positions - pad,
        rope=positions - pad,
        valid=positions >= pad,
        n_seen=torch.tensor([n - pad]),
        n_kept=torch.tensor([kept]),
        next_position=torch.tensor([n]),
        layer=0,
        depth=0,
        n_layers=1,
        pair_bytes=PairBytes(20, 0),
        rule=AttentionRule(1.0),
    )


def stay(scores, table):
    mask = TopK(Ratio(0.5)).select(scores.view(1, 1, -1), table.valid, table.n_kept)
    return mask[0, 0].nonzero().flatten().tolist()


def test_of_equal_scores_the_newest_stay():
    assert stay(torch.zeros(8), view(8, 3)) == [5, 6, 7]


def test_nan_and_infinities_lose_or_win_but_never_padding():
    scores = torch.tensor([float("inf"), float("nan"), float("-inf"), 0.0, float("inf"), 1.0])
    assert stay(scores, view(6, 2)) == [0, 4]
    assert stay(scores, view(6, 5)) == [0, 2, 3, 4, 5]
    assert stay(scores, view(6, 4, pad=2)) == [2, 3, 4, 5]


def test_pins_beat_every_free_score():
    table = view(10, 5)
    scores = torch.full((1, 1, 10), 9e37)
    pinned = pin_window(pin_sinks(scores, table, 2), table, 2)
    assert stay(pinned, table) == [0, 1, 7, 8, 9]


def test_when_pins_exceed_the_budget_sinks_come_first_then_the_newest():
    for n_kept, wanted in ((1, [0]), (2, [0, 1]), (3, [0, 1, 9]), (4, [0, 1, 8, 9])):
        table = view(10, n_kept)
        pinned = pin_sinks(pin_window(rand(1, 1, 10), table, 6), table, 2)
        assert stay(pinned, table) == wanted


def test_a_view_slices_every_column_of_pairs():
    part = view(10, 5)[2:6]
    assert part.keys.shape == (1, 1, 4, 2)
    assert part.positions.tolist() == part.index.tolist() == [[[2, 3, 4, 5]]]
    assert part.n_kept.tolist() == [5]


def plain_shares(weights, total, least, most):
    """Exact shares: those out of bounds are set to the bound, one after the other."""
    fixed = {}
    while True:
        free = [i for i in range(len(weights)) if i not in fixed]
        rest = total - sum(fixed.values())
        if not free:
            return [fixed[i] for i in range(len(weights))]
        scale = rest / sum(weights[i] for i in free)
        over = sum(max(0, weights[i] * scale - most) for i in free)
        under = sum(max(0, least - weights[i] * scale) for i in free)
        if not over and not under:
            return [fixed.get(i, weights[i] * scale) for i in range(len(weights))]
        for i in free:
            share = weights[i] * scale
            if over >= under and share > most:
                fixed[i] = most
            elif over < under and share < least:
                fixed[i] = least


@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=9),
    total=st.integers(0, 400),
    least=st.integers(0, 3),
    more=st.integers(0, 60),
)
def test_apportioned_numbers_are_exact_in_sum_and_within_one_of_their_shares(
    weights, total, least, more
):
    most, x = least + more, len(weights)
    counts = apportion(torch.tensor(weights), total, least, most).tolist()
    reachable = min(max(total, least * x), most * x)
    assert sum(counts) == reachable
    assert least <= min(counts) and max(counts) <= most
    shares = plain_shares([Fraction(w) for w in weights], Fraction(reachable), least, most)
    assert all(abs(n - share) < 1 for n, share in zip(counts, shares, strict=True))


@pytest.mark.parametrize(
    ("weights", "total", "least", "most", "wanted"),
    [
        ([1, 2, 3], 60, 0, 100, [10, 20, 30]),
        # Shares 3.5, 2.625 and 0.875: remainders .5, .625 and .875 for 2 that are left.
        ([4, 3, 1], 7, 0, 7, [3, 3, 1]),
        # 5 is the most: the others share the 5 that are left, 2 to 1.
        ([97, 2, 1], 10, 0, 5, [5, 3, 2]),
        # 2 is the least: the first has what the others leave.
        ([1, 0, 0], 10, 2, 100, [6, 2, 2]),
        # Of equal remainders the first are rounded up.
        ([1, 1, 1, 1], 6, 0, 9, [2, 2, 1, 1]),
        ([0, 0, 0], 5, 0, 9, [2, 2, 1]),
        ([3, 1], 0, 1, 9, [1, 1]),
        ([3, 1], 100, 1, 9, [9, 9]),
        ([3, 1], 5, 0, 0, [0, 0]),
    ],
)
def test_apportioned_by_hand(weights, total, least, most, wanted):
    assert apportion(torch.tensor(weights), total, least, most).tolist() == wanted


def test_heads_that_compete_share_a_window_that_is_too_large():
    press = cp.AdaKVPress(cp.SnapKVPress(n_kept=5, window_size=20), alpha_safeguard=0.0)
    for layer in kept(cp.prefill(tiny(), tokens(40), press)):
        assert layer[0] == [list(range(35, 40))] * 2
