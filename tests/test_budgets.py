"""Which rows stay when pins, ties and numbers out of range meet."""

import torch

from cachepress.budgets import Ratio, TopK, pin_sinks, pin_window
from cachepress.ops import AttentionRule
from cachepress.view import LayerView


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
        row_bytes=(20, 0),
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
    for kept, wanted in ((1, [0]), (2, [0, 1]), (3, [0, 1, 9]), (4, [0, 1, 8, 9])):
        table = view(10, kept)
        pinned = pin_sinks(pin_window(torch.rand(1, 1, 10), table, 6), table, 2)
        assert stay(pinned, table) == wanted


def test_a_view_slices_every_row_column():
    part = view(10, 5)[2:6]
    assert part.keys.shape == (1, 1, 4, 2)
    assert part.positions.tolist() == part.index.tolist() == [[[2, 3, 4, 5]]]
    assert part.n_kept.tolist() == [5]
