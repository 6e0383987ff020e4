import pytest
import torch

from cachepress.ops import narrowest, wide, wide_dtype, without_autocast
from cachepress.ranks import best, pin_sinks


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
    ],
)
def test_half_types_are_widened_and_doubles_stay(given, wanted):
    x = torch.ones(3).to(given)
    assert wide_dtype(x) == wanted
    assert torch.equal(wide(x), torch.ones(3, dtype=wanted))
    assert (wide(x) is x) == (given == wanted)


def test_scores_that_differ_by_less_than_float32_tells_are_ranked():
    scores = torch.tensor([[[1 + 2e-12, 1 + 3e-12, 1 + 1e-12, 1.0]]], dtype=torch.float64)
    mask = best(scores, torch.ones(1, 1, 4, dtype=torch.bool), torch.tensor([[[2.0]]]))
    assert mask.tolist() == [[[True, True, False, False]]]


def test_pins_leave_doubles_as_they_are():
    class View:
        index = torch.arange(3).view(1, 1, 3)

    scores = torch.tensor([[[0.0, 0.0, 1 + 1e-12]]], dtype=torch.float64)
    assert pin_sinks(scores, View, 1)[0, 0, 2] == 1 + 1e-12


def test_autocast_is_suspended_where_numbers_were_made_wide():
    x, cpu = torch.randn(8, 8), torch.device("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert narrowest(x) == torch.bfloat16
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(cpu):
            assert narrowest(x) == torch.float32
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    assert narrowest(x.half()) == torch.float16
    with without_autocast(torch.device("meta")):
        assert narrowest(x) == torch.float32
