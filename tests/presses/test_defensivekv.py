"""DefensiveKV against the paper's two algorithms, written out with loops."""

from dataclasses import replace

import pytest
import torch

import cachepress as cp
from cachepress.budgets import pinned
from cachepress.cache import stores
from cachepress.presses.defensivekv import DefensiveKVPress
from tests.presses.test_snapkv import (
    assert_each_text_is_as_if_alone,
    assert_second_turns_are_as_if_alone,
    extras,
    noting,
    weights_of,
)
from tests.tiny import tiny, tokens
from tests.tiny_cache import kept, pressed

PRESS = DefensiveKVPress(0.5, window_size=4, kernel_size=3)


def sizes_of(view, weight):
    """|v W_O|_1 of each value, mean over the query heads of the group, ``[B, H, T]``."""
    b, h, t, e = view.values.shape
    g = view.queries.shape[2]
    sizes = torch.zeros(b, h, t)
    for i in range(b):
        for j in range(h):
            for row in range(t):
                for k in range(g):
                    part = weight[:, (j * g + k) * e : (j * g + k + 1) * e]
                    sizes[i, j, row] += (part @ view.values[i, j, row]).abs().sum() / g
    return sizes


def plainly(view, depth, n, kernel, weight, softcap, sinks):
    b, h, g, q, _ = view.queries.shape
    free = view.keys.shape[2] - n
    risk = torch.zeros(b, h, free)
    for i in range(b):
        for j in range(h):
            worst = [0.0] * free
            for k in range(g):
                for query in range(q - n, q):
                    row = weights_of(view, depth, i, j, k, query, softcap, sinks)
                    for c in range(free):
                        near = range(max(0, c - kernel // 2), min(free, c + kernel // 2 + 1))
                        worst[c] = max(worst[c], sum(row[x] for x in near) / kernel)
            prior = sum(worst) / free
            risk[i, j] = torch.tensor([max(x, prior) for x in worst])
    sizes = sizes_of(view, weight)[..., :free]
    return risk * sizes / sizes.sum((1, 2), keepdim=True)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_score_is_that_of_the_paper(name):
    model = tiny(name)
    press, seen = noting(PRESS)
    pressed(model, press, tokens(20, batch=2))
    for depth, [(view, score)] in seen.items():
        weight = model.model.layers[view.layer].self_attn.o_proj.weight.detach()
        wanted = plainly(view, depth, 4, 3, weight, *extras(name, model))
        torch.testing.assert_close(score[..., :-4], wanted, atol=1e-6, rtol=1e-5)
        assert pinned(score)[..., -4:].all() and not pinned(score)[..., :-4].any()


def test_rows_below_the_mean_risk_are_as_good_as_each_other():
    press, seen = noting(PRESS)
    pressed(tiny(), press, tokens(30))
    for [(view, _)] in seen.values():
        score = PRESS.score(replace(view, values=torch.ones_like(view.values)))[0, :, :-4]
        raised = score == score.amin(-1, keepdim=True)
        assert (raised.sum(-1) > 3).all() and (raised.sum(-1) < 26).all()
        assert (score.mean(-1) > score.amin(-1)).all()


def test_model_wide_competition_is_over_shares_of_each_layer():
    press, seen = noting(PRESS)
    model, ids = tiny(), tokens(40)
    around = cp.AdaKVPress(press, alpha_safeguard=0.0, scope="model")
    cache = pressed(model, around, ids)
    scores = torch.stack([seen[depth][0][1] for depth in range(4)])
    least = scores.flatten().sort(descending=True).values[4 * 2 * 20 - 1]
    lengths = torch.stack([store.lengths for store in stores(cache)])
    assert torch.equal(lengths, (scores >= least).sum(-1))
    assert len(set(lengths.sum(-1).flatten().tolist())) > 1


def test_padding_and_short_texts_change_nothing():
    assert_each_text_is_as_if_alone(PRESS)
    assert_each_text_is_as_if_alone(DefensiveKVPress(0.5, window_size=64))


def test_turns_of_different_lengths_change_nothing():
    assert_second_turns_are_as_if_alone(PRESS)


def test_a_text_of_one_row_and_one_within_the_window_have_finite_scores():
    for n in (2, 5):
        press, seen = noting(DefensiveKVPress(0.5, window_size=5))
        cache = pressed(tiny(), press, tokens(n))
        assert all(score.isfinite().all() for [(_, score)] in seen.values())
        assert kept(cache)[0][0] == [list(range(n - n // 2, n))] * 2


def test_bf16_is_scored_in_float32():
    press, seen = noting(PRESS)
    pressed(tiny().bfloat16(), press, tokens(30))
    assert all(score.dtype == torch.float32 for [(_, score)] in seen.values())


def test_a_gated_output_is_refused():
    with pytest.raises(cp.UnsupportedError, match="does not take what attention gave"):
        pressed(tiny("qwen3_next"), PRESS, tokens(30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, "window_size: got 0, wanted a whole number"),
        ({"kernel_size": 2}, "kernel_size: got 2, wanted an odd number"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(cp.CachepressError, match=message):
        DefensiveKVPress(0.5, **options)
