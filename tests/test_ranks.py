"""Pinned tokens go before all others, sinks first, in texts of any length."""

from types import SimpleNamespace

import pytest
import torch

from cachepress.ranks import FREE, TAKEN, best, choose, pin, pin_sinks, pin_window, pinned


def ranked(index: list[int], n_seen: int, window: int, sinks: int) -> torch.Tensor:
    column = torch.tensor(index).view(1, 1, -1)
    view = SimpleNamespace(index=column, n_seen=torch.tensor([n_seen]))
    scores = pin_window(torch.full(column.shape, FREE), view, window)
    return pin_sinks(scores, view, sinks)[0, 0]


@pytest.mark.parametrize("n_seen", [10, 1_500_000, 2**31 - 1])
@pytest.mark.parametrize("window", [3, 1_400_000, 2**31 - 1])
def test_sinks_are_above_any_window_and_windows_above_what_is_free(n_seen, window):
    index = [0, 1, 2, 3, n_seen // 2, n_seen - 2, n_seen - 1]
    scores = ranked(index, n_seen, window, sinks=3)
    assert scores[0] > scores[1] > scores[2] > scores[3:].max()
    assert scores[-1] > scores[-2] > scores[3:-2].max()
    assert scores[-2] > TAKEN


@pytest.mark.parametrize("age", [1, 2, 1_000_000, 2**21 - 1])
def test_each_place_of_a_tier_has_its_own_number(age):
    n_seen = 2**22
    scores = ranked([0, n_seen - age - 1, n_seen - age], n_seen, window=n_seen, sinks=1)
    assert scores[0] > scores[2] > scores[1] > TAKEN
    sinks = ranked([age - 1, age, n_seen - 1], n_seen, window=1, sinks=n_seen - 1)
    assert sinks[0] > sinks[1] > sinks[2]


def test_tokens_beyond_the_places_of_a_tier_tie_and_the_newest_stay():
    n_seen = 2**23
    scores = ranked([0, 1, 2], n_seen, window=n_seen, sinks=0)
    assert scores[0] == scores[1] == scores[2]
    mask = best(scores.view(1, 1, 3), torch.ones(1, 1, 3, dtype=torch.bool), torch.tensor([[[2]]]))
    assert mask[0, 0].tolist() == [False, True, True]


def test_what_is_chosen_is_above_what_is_free_and_what_is_pinned_stays():
    scores = torch.tensor([[[1.0, 3e38, 2.0]]])
    tokens = torch.tensor([[[True, True, False]]])
    assert pin(scores, tokens)[0, 0].tolist() == [pytest.approx(TAKEN), pytest.approx(3e38), 2.0]
    chosen = choose(scores, tokens)[0, 0].tolist()
    assert chosen == [pytest.approx(TAKEN), pytest.approx(TAKEN), 2.0]
    assert pinned(scores)[0, 0].tolist() == [False, True, False]
