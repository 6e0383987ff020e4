"""One reading that many presses share leaves each of them the cache of a reading of its own."""

from functools import cache

import pytest

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.hf.shared_prefill import SharedPrefill, shares
from tests.bounds import close
from tests.laws.presses import RATIO, UNSUPPORTED, WRAPPERS, every_scorer, name_of
from tests.tiny import exact_tiny, tiny, tokenizer, tokens
from tests.tiny_cache import forward, kept

RATIOS = (0.0, RATIO, 0.6)
IDS = tokens(40, seed=40)
SCORERS = {name_of(press): press for press in every_scorer(RATIO)}


@cache
def model():
    return exact_tiny()


@cache
def presses(wrapper):
    """Every scorer in a wrapper that can share a reading: bare at every ratio, else at one."""
    built = [
        WRAPPERS[wrapper].build(scorer.with_ratio(ratio), ratio)
        for i, (name, scorer) in enumerate(SCORERS.items())
        if (name, wrapper) not in UNSUPPORTED
        for ratio in (RATIOS if wrapper == "none" else (RATIOS[i % len(RATIOS)],))
    ]
    return [press for press in built if shares(press)]


@cache
def survey(chunk):
    """One reading for all of them."""
    everyone = [press for wrapper in WRAPPERS for press in presses(wrapper)]
    shared = SharedPrefill(model(), everyone, tokenizer())
    shared.read(IDS, chunk)
    return shared


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_shared_reading_is_as_one_alone(wrapper, chunk):
    for press in presses(wrapper):
        ours, seconds = survey(chunk).compressed(press)
        alone = cp.prefill(model(), IDS, press, chunk_size=chunk, tokenizer=tokenizer())
        assert kept(ours) == kept(alone), press
        assert seconds >= 0
        for store, wanted in zip(compressed_layers(ours), compressed_layers(alone), strict=True):
            assert (store.codec, store.page_budget) == (wanted.codec, wanted.page_budget)
            assert store.scored_at == wanted.scored_at
            rows, alike = store.snapshot.rows(), wanted.snapshot.rows()
            for name in ("keys", "values", "rope", "token_state"):
                x, y = getattr(rows, name), getattr(alike, name)
                assert (x is None) == (y is None)
                if x is not None:
                    assert x.dtype == y.dtype
                    close(x.double(), y.double())


def test_the_shared_cache_stays_whole():
    shared, whole = survey(None), cp.prefill(model(), IDS)
    after = forward(model(), cp.fork(shared.cache), input_ids=IDS[:, :1]).logits
    close(after, forward(model(), whole, input_ids=IDS[:, :1]).logits)
    assert shared.whole_bytes == 4 * 2 * 2 * 40 * 8 * 8


def test_a_press_that_needs_the_question_cannot_share():
    with pytest.raises(cp.CachepressError, match="observes the question"):
        SharedPrefill(tiny(), [cp.FinchPress(0.5)])


def test_storage_is_that_of_the_call():
    ours, _ = survey(None).compressed(presses("none")[0], "int8")
    assert {store.codec.bits for store in compressed_layers(ours)} == {8}
