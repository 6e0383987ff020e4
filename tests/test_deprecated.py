"""Attributes under the names that they had in version 0.1."""

from dataclasses import dataclass

import pytest
import torch

import cachepress as cp
from cachepress.view import Needs
from tests.tiny import tiny, tokens
from tests.tiny_cache import pressed


def warned(name: str, new: str):
    return pytest.warns(DeprecationWarning, match=f"{name} is called {new} since version 0.2")


@pytest.mark.parametrize(
    ("press", "old", "new", "value"),
    [
        (cp.H2OPress(0.5), "carries", "needs.token_state", True),
        (cp.H2OPress(0.5), "rewrites", "needs.always", True),
        (cp.KnormPress(0.5), "carries", "needs.token_state", False),
        (cp.KeyRerotationPress(cp.KnormPress(0.5)), "compacts", "needs.compaction", True),
        (cp.SnapKVPress(0.5, window_size=8), "buffer", "needs.most_decoded", 8),
        (cp.KIVIPress(cp.KnormPress()), "storage", "needs.storage", cp.Codec(2, 128, 32)),
        (cp.KVzipPress(0.0), "replay", "needs.reconstruction", None),
    ],
)
def test_what_a_press_declares_answers_to_its_old_name(press, old, new, value):
    with warned(f"{type(press).__name__}.{old}", new):
        assert getattr(press, old) == value


def test_methods_answer_to_their_old_names():
    press = cp.QuestPress(pages=3)
    with warned("QuestPress.reads", "needs.pages_read"):
        assert [press.reads(depth) for depth in (1, 2)] == [None, 3]
    with warned("QuestPress.fold", "merge"):
        assert press.fold(None, None) is None


def test_a_method_that_is_defined_under_its_old_name_is_called():
    with warned("Halving.channels", "key_channels"):

        @dataclass(frozen=True)
        class Halving(cp.KnormPress):
            @property
            def needs(self) -> Needs:
                return Needs(rewrites=True)

            def channels(self, view, mask):
                first = torch.arange(view.keys.shape[-1]) < 4
                return first.expand(*view.keys.shape[:2], -1)

    cache = pressed(tiny(), Halving(0.5), tokens(20))
    assert int((cache.layers[0].keys != 0).any(2).sum(-1).max()) == 4


def test_what_is_a_field_of_needs_by_now_cannot_be_defined_under_its_old_name():
    with pytest.raises(TypeError, match="defines carries, which is declared as needs.token_state"):
        type("Carrying", (cp.KnormPress,), {"carries": True})


def test_a_cache_and_a_view_answer_to_their_old_names():
    class Reading(cp.KnormPress):
        def score(self, view):
            with warned("LayerView.carried", "token_state"):
                assert view.carried is view.token_state
            with warned("LayerView.noted", "hidden_feature"):
                assert view.noted is None
            with warned("LayerView.row_bytes", "pair_bytes"):
                assert view.row_bytes is view.pair_bytes
            return super().score(view)

    size = cp.size_of(pressed(tiny(), Reading(0.5), tokens(20)))
    with warned("CacheSize.rows_seen", "pairs_seen"):
        assert size.rows_seen == size.pairs_seen == 4 * 2 * 20
    with warned("CacheSize.rows_held", "pairs_held"):
        assert size.rows_held == size.pairs_held == 4 * 2 * 10
