"""A wrapper overrides one answer and forwards the rest."""

from dataclasses import dataclass

import pytest

import cachepress as cp
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import kept, pressed


@dataclass(frozen=True)
class UpsideDownPress(cp.WrapperPress):
    def score(self, view):
        return -self.press.score(view)


def test_a_wrapper_forwards_and_nests():
    inner = cp.SnapKVPress(0.5, window_size=6)
    twice = UpsideDownPress(UpsideDownPress(inner))
    model, ids = tiny(), tokens(30)
    assert twice.needs == inner.needs
    assert kept(pressed(model, twice, ids)) == kept(pressed(model, inner, ids))
    once = UpsideDownPress(cp.KnormPress(0.5))
    assert kept(pressed(model, once, ids)) != kept(pressed(model, cp.KnormPress(0.5), ids))


def test_the_ratio_reaches_through_and_the_spelling_parses():
    press = UpsideDownPress(cp.RandomPress(0.5, seed=4)).with_ratio(0.25)
    assert press.press == cp.RandomPress(0.25, seed=4)
    assert cp.parse(repr(press)) == press


def test_what_is_wrapped_must_be_a_press():
    with pytest.raises(cp.CachepressError, match="UpsideDownPress wraps a press: got 3"):
        UpsideDownPress(3)
