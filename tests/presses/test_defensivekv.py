"""DefensiveKV against what its authors released, written out with loops."""

from dataclasses import replace

import pytest
import torch

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.presses.defensivekv import DefensiveKVPress
from cachepress.ranks import pinned
from tests.bounds import close
from tests.presses.test_snapkv import (
    assert_each_text_is_as_if_alone,
    assert_second_turns_are_as_if_alone,
    eager,
    extras,
    recording,
    weights_of,
)
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import kept, pressed

PRESS = DefensiveKVPress(0.5, window_size=4, kernel_size=3)


def sizes_of(view, weight):
    """|v W_O|_1 of each value, mean over the query heads of the group, ``[B, H, T]``."""
    b, h, t, e = view.values.shape
    g = view.queries.shape[2]
    sizes = torch.zeros(b, h, t, dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            for row in range(t):
                for k in range(g):
                    part = weight[:, (j * g + k) * e : (j * g + k + 1) * e]
                    sizes[i, j, row] += (part @ view.values[i, j, row]).abs().sum() / g
    return sizes


def transcription(view, depth, n, kernel, weight, softcap, sinks):
    """The scores of the pairs before the window, and which of them the first stage keeps."""
    b, h, g, q, _ = view.queries.shape
    free = view.keys.shape[2] - n
    risk, sure = view.keys.new_zeros(b, h, free), torch.zeros(b, h, free, dtype=torch.bool)
    for i in range(b):
        means, near_window = [], []
        for j in range(h):
            worst, mean = [0.0] * free, [0.0] * free
            for k in range(g):
                for query in range(q - n, q):
                    row = weights_of(view, depth, i, j, k, query, softcap, sinks)[:free]
                    near_window.append(sum(row[-n:]))
                    smooth = []
                    for c in range(free):
                        mean[c] += row[c] / (g * n)
                        near = range(max(0, c - kernel // 2), min(free, c + kernel // 2 + 1))
                        smooth.append(sum(row[x] for x in near) / kernel)
                    back = sum(row) / sum(smooth)
                    worst = [max(x, y * back) for x, y in zip(worst, smooth, strict=True)]
            prior = sum(worst) / free
            risk[i, j] = torch.tensor([max(x, prior) for x in worst], dtype=risk.dtype)
            means.append(mean)
        wanted = 0.9 - sum(near_window) / len(near_window)
        for j, mean in enumerate(means):
            mass = 0.0
            for c in sorted(range(free), key=lambda c: mean[c], reverse=True):
                mass += mean[c] / sum(mean)
                if mass >= wanted or int(sure[i, j].sum()) >= int(view.n_kept[i]) - n:
                    break
                sure[i, j, c] = True
    sizes = sizes_of(view, weight)[..., :free]
    return risk * sizes / sizes.sum(1, keepdim=True), sure


@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_score_is_that_of_the_authors(name, ratio):
    model = eager(name)
    press, seen = recording(PRESS.with_ratio(ratio))
    pressed(model, press, tokens(20, batch=2))
    counts = set()
    for depth, [(view, score)] in seen.items():
        weight = model.model.layers[view.layer].self_attn.o_proj.weight.detach()
        wanted, sure = transcription(view, depth, 4, 3, weight, *extras(name, model))
        assert torch.equal(pinned(score)[..., :-4], sure)
        counts |= set(sure.sum(-1).flatten().tolist())
        close(score[..., :-4][~sure], wanted[~sure])
        assert pinned(score)[..., -4:].all()
        assert score[..., -4:].amin() > score[..., :-4].amax()
    room = int(20 * (1 - ratio)) - 4
    assert max(counts) <= room and (len(counts) > 1 or room in counts)


def test_pairs_below_the_mean_risk_are_as_good_as_each_other():
    press, seen = recording(PRESS)
    pressed(tiny(), press, tokens(30))
    for [(view, _)] in seen.values():
        # No room for the first stage.
        view = replace(view, n_kept=torch.tensor([4]), values=torch.ones_like(view.values))
        score = PRESS.score(view)[0, :, :-4]
        raised = score == score.amin(-1, keepdim=True)
        assert (raised.sum(-1) > 3).all() and (raised.sum(-1) < 26).all()
        assert (score.mean(-1) > score.amin(-1)).all()


def test_the_first_stage_keeps_pairs_that_risk_and_size_would_evict():
    """A head whose attention lies on few pairs keeps those, however small their values are."""
    press, seen = recording(PRESS)
    pressed(tiny(), press, tokens(30))
    [(view, _)] = seen[2]
    mean = (view.window_attention(4)[..., :-4]).mean(2)
    best = mean.argmax(-1)  # [B, H]
    tiniest = 1e-9 * torch.ones_like(view.values[:, :, :1])
    small = view.values.scatter(2, best[..., None, None].expand(-1, -1, 1, 8), tiniest)
    score = PRESS.score(replace(view, values=small))
    assert pinned(score).gather(-1, best.unsqueeze(-1)).all()
    none = PRESS.score(replace(view, values=small, n_kept=torch.tensor([4])))
    assert torch.equal(none[..., :-4].argmin(-1), best)


def test_model_wide_competition_is_over_shares_of_each_layer():
    press, seen = recording(PRESS)
    model, ids = tiny(), tokens(40)
    around = cp.AdaKVPress(press, alpha_safeguard=0.0, scope="model")
    cache = pressed(model, around, ids)
    scores = torch.stack([seen[depth][0][1] for depth in range(4)])
    least = scores.flatten().sort(descending=True).values[4 * 2 * 20 - 1]
    lengths = torch.stack([store.lengths for store in compressed_layers(cache)])
    assert torch.equal(lengths, (scores >= least).sum(-1))
    assert len(set(lengths.sum(-1).flatten().tolist())) > 1


def test_padding_and_short_texts_change_nothing():
    assert_each_text_is_as_if_alone(PRESS)
    assert_each_text_is_as_if_alone(DefensiveKVPress(0.5, window_size=64))


def test_turns_of_different_lengths_change_nothing():
    assert_second_turns_are_as_if_alone(PRESS)


def test_a_text_of_one_token_and_one_within_the_window_have_finite_scores():
    for n in (2, 5):
        press, seen = recording(DefensiveKVPress(0.5, window_size=5))
        cache = pressed(tiny(), press, tokens(n))
        assert all(score.isfinite().all() for [(_, score)] in seen.values())
        assert kept(cache)[0][0] == [list(range(n - n // 2, n))] * 2


def test_bf16_is_scored_in_float32():
    press, seen = recording(PRESS)
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
