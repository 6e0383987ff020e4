"""Q-Filters against one product for each pair."""

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.artefacts.kept import save_artefact
from cachepress.presses.qfilter import QFilterPress
from tests.bounds import close, near
from tests.presses.test_snapkv import (
    assert_each_text_is_as_if_alone,
    assert_second_turns_are_as_if_alone,
    recording,
)
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward, kept, pressed

FILTERS = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def filters(tmp_path_factory):
    path = tmp_path_factory.mktemp("filters") / "q_filters.safetensors"
    save_artefact(path, "q_filters", {"filters": FILTERS}, {})
    return str(path)


def test_the_pairs_whose_keys_reach_farthest_stay(filters):
    model, ids, plain = tiny(), tokens(30), DynamicCache()
    forward(model, plain, input_ids=ids)
    press, seen = recording(QFilterPress(0.6, filters=filters))
    held = kept(pressed(model, press, ids))
    for depth in range(4):
        [(_, score)] = seen[depth]
        for h in range(2):
            keys = plain.layers[depth].keys[0, h].tolist()
            wanted = [
                sum(a * b for a, b in zip(key, FILTERS[depth, h].tolist(), strict=True))
                for key in keys
            ]
            close(score[0, h], torch.tensor(wanted, dtype=torch.float64))
            best = sorted(range(30), key=lambda t: wanted[t], reverse=True)[:12]
            assert held[depth][0][h] == sorted(best)


def test_padding_and_turns_change_nothing(filters):
    assert_each_text_is_as_if_alone(QFilterPress(0.5, filters=filters))
    assert_second_turns_are_as_if_alone(QFilterPress(0.5, filters=filters))


def test_bfloat16_keys_are_multiplied_in_float32(filters):
    press, seen = recording(QFilterPress(0.5, filters=filters))
    pressed(tiny().bfloat16(), press, tokens(12))
    view, score = seen[1][0]
    assert view.keys.dtype == torch.bfloat16 and score.dtype == torch.float32
    wanted = (view.keys.double() * FILTERS[1].double()[None, :, None]).sum(-1)
    near(score, wanted, torch.float32, terms=8)


def test_filters_are_by_rank_among_the_compressed_layers(tmp_path):
    """In a model of which every other layer slides, layer 3 is the second that is compressed."""
    path = tmp_path / "q_filters.safetensors"
    save_artefact(path, "q_filters", {"filters": FILTERS[:2]}, {})
    press, seen = recording(QFilterPress(0.5, filters=str(path)))
    pressed(tiny("gemma3"), press, tokens(12))
    view, score = seen[1][0]
    assert view.layer == 3
    close(score, (view.keys * FILTERS[1][None, :, None]).sum(-1))


def test_what_does_not_fit_is_refused_before_any_work(filters, tmp_path):
    model, calls = tiny(), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(cp.CachepressError, match="cachepress train q_filters --model"):
        cp.prefill(model, tokens(9), QFilterPress(0.5, filters=str(tmp_path)))
    other = tmp_path / "lukv.safetensors"
    save_artefact(other, "lukv", {"filters": FILTERS}, {})
    with (
        pytest.raises(cp.CachepressError, match="holds lukv, wanted q_filters"),
        QFilterPress(0.5, filters=str(other))(model),
    ):
        pass
    with pytest.raises(cp.CachepressError, match="filters is [(]4, 2, 8[)], wanted [(]4, 4, 8[)]"):
        cp.prefill(tiny("gpt2"), tokens(9), QFilterPress(0.5, filters=filters))
    assert not calls


def test_a_file_that_is_written_anew_is_read_anew(tmp_path):
    path = tmp_path / "q_filters.safetensors"
    press, seen = recording(QFilterPress(0.5, filters=str(path)))
    for sign in (1, -1):
        save_artefact(path, "q_filters", {"filters": sign * FILTERS}, {})
        pressed(tiny(), press, tokens(9))
    (_, first), (_, second) = seen[0]
    assert torch.equal(first, -second)


def test_the_spelling(filters):
    press = QFilterPress(0.5, filters=filters)
    assert cp.parse(repr(press)) == press
    assert press.for_model(tiny()) == press
    assert QFilterPress(0.5, filters=filters.rsplit("/", 1)[0]).for_model(tiny()) == press
    with pytest.raises(TypeError, match="not made ready"):
        QFilterPress(0.5).score(None)
