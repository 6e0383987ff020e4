"""What a model computes in float64 stays so in every score, sum and stored pair."""

import pytest
from transformers import DynamicCache

import cachepress as cp
from tests.exact import narrow
from tests.laws.presses import RATIO, UNSUPPORTED, WRAPPERS, every_scorer, name_of
from tests.tiny import exact_tiny, tiny, tokens
from tests.tiny_cache import forward

SCORERS = {name_of(press): press for press in every_scorer(RATIO)}
ROUNDED = {
    "entropy_chunkkv.py": "entropies are rounded, so that chunks with equal shares are equal",
    "codec.py": "rows are stored in few bits",
}
"""Files that make less of float64 on purpose, and why."""


def narrowed(model, press):
    """Where a prompt and a decoded token lose precision."""
    cache = DynamicCache()
    with press(model, question=3), narrow(of_float64=True) as found:
        forward(model, cache, input_ids=tokens(30))
        forward(model, cache, input_ids=tokens(1))
    places = {place.rsplit("/", 1)[-1].split(":")[0]: place for _, place in found}
    return {place for file, place in places.items() if file not in ROUNDED}


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_scorer_computes_in_float64(scorer):
    assert narrowed(exact_tiny(), SCORERS[scorer]) == set()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_computes_in_float64(wrapper):
    scorer = "KeyDiffPress" if ("SnapKVPress", wrapper) in UNSUPPORTED else "SnapKVPress"
    press = WRAPPERS[wrapper].build(SCORERS[scorer], RATIO)
    assert narrowed(exact_tiny(), press) == set()


def test_a_cast_is_found_out():
    """transformers' own model casts: the test above would tell."""
    assert narrowed(tiny().double(), cp.KnormPress(0.5))
