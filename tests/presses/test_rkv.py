"""R-KV against the paper's two estimates, written out with loops."""

from dataclasses import replace
from math import exp, tanh

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.ops import similarity
from cachepress.presses import rkv
from cachepress.presses.rkv import RKVPress
from cachepress.ranks import pinned
from tests.bounds import close, near
from tests.presses.test_snapkv import (
    assert_each_text_is_as_if_alone,
    assert_second_turns_are_as_if_alone,
    eager,
    extras,
    recording,
)
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward, kept, pressed

PRESS = RKVPress(0.5, window_size=4, kernel_size=3, threshold=0.3)


def importance_of(view, b, h, n, kernel, softcap, sinks):
    """Mean over the last ``n`` queries, then the highest of the pairs around, a list of floats."""
    queries, keys = view.queries[b, h].double(), view.keys[b, h].double()
    g, q, _ = queries.shape
    free = keys.shape[0] - n

    def logit(k, i, c):
        x = float(queries[k, i] @ keys[c]) * view.rule.scaling
        return softcap * tanh(x / softcap) if softcap else x

    mean = [0.0] * free
    for i in range(q - n, q):
        highest = [max(logit(k, i, c) for k in range(g)) for c in range(free)]
        total = sum(exp(x) for x in highest)
        if sinks is not None:
            total += exp(max(float(sinks[h * g + k]) for k in range(g)))
        mean = [m + exp(x) / total / n for m, x in zip(mean, highest, strict=True)]
    half = kernel // 2
    return [max(mean[max(0, c - half) : c + half + 1]) for c in range(free)]


def redundancy_of(keys, threshold):
    keys = [key / key.norm() for key in keys.double()]
    n = len(keys)
    alike = [[0.0 if i == j else float(keys[i] @ keys[j]) for j in range(n)] for i in range(n)]
    for row in alike:
        near = [j for j in range(n) if row[j] > threshold]
        if near:
            row[near[-1]] = 0.0
    means = [sum(row[j] for row in alike) / n for j in range(n)]
    total = sum(exp(x) for x in means)
    return [exp(x) / total for x in means]


def check(press, view, score, layer_sinks=None, softcap=None):
    """That of every head, compared with the transcription."""
    assert view.valid.all()
    for b in range(score.shape[0]):
        for h in range(score.shape[1]):
            n = min(press.window_size, view.queries.shape[-2])
            first = importance_of(view, b, h, n, press.kernel_size, softcap, layer_sinks)
            second = redundancy_of(view.keys[b, h], press.threshold)
            mix = press.mix_lambda
            pairs = zip(first, second, strict=False)
            wanted = torch.tensor([mix * x - (1 - mix) * y for x, y in pairs], dtype=torch.float64)
            known = ~pinned(score[b, h])[: len(wanted)]
            found = score[b, h, : len(wanted)][known]
            if score.dtype == torch.float64:
                close(found, wanted[known])
            else:
                near(found, wanted[known], score.dtype, terms=8 + 3 * score.shape[-1])


@pytest.mark.parametrize("block", [256, 5])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_score_is_that_of_the_paper(name, block, monkeypatch):
    monkeypatch.setattr(similarity, "_BLOCK", block)
    monkeypatch.setattr(similarity, "_NUMBERS", 8 * block)
    monkeypatch.setattr(rkv, "_BLOCK", block)
    model = eager(name)
    press, seen = recording(RKVPress(0.5, 4, 3, mix_lambda=0.4, threshold=0.3))
    pressed(model, press, tokens(21, batch=2))
    softcap, sinks = extras(name, model)
    for depth, [(view, score)] in seen.items():
        check(press, view, score, sinks and sinks[depth], softcap)
        assert pinned(score)[..., -4:].all() and not pinned(score)[..., :-4].any()


def test_of_pairs_that_are_alike_the_newest_stays():
    press, seen = recording(RKVPress(0.5, window_size=1, mix_lambda=0.0))
    pressed(tiny(), press, tokens(12))
    view = seen[0][0][0]
    keys = torch.eye(12, dtype=torch.float64)[:, :8].repeat(1, 1, 1, 1)
    keys[..., [1, 4, 7], :] = torch.eye(8, dtype=torch.float64)[2]
    keys[..., 8:, :] = torch.eye(8, dtype=torch.float64)[7]
    keys = keys.expand(1, 2, 12, 8)
    score = RKVPress(0.5, window_size=1, mix_lambda=0.0).score(replace(view, keys=keys))
    head = score[0, 0, :11].tolist()
    # 1, 2, 4 and 7 are alike. All others let 7 off, which then is as good as a pair like no other;
    # 7 itself lets 4 off. Of 8 to 11 the last is in the window, and lets 10 off.
    assert head[7] == head[0] == head[3] == head[5] == head[6]
    assert head[7] > head[4] > head[2] == head[1]
    assert head[4] == head[10] > head[9] == head[8]


def test_decoding_is_scored_by_the_last_decoded_queries():
    model, ids = tiny(), tokens(40)
    inner, seen = recording(PRESS)
    cache = DynamicCache()
    with cp.DecodingPress(inner, compression_interval=8, target_size=12)(model):
        forward(model, cache, input_ids=ids[:, :16])
        for step in range(16, 40):
            forward(model, cache, input_ids=ids[:, step : step + 1])
    assert all(len(views) == 4 for views in seen.values())
    for views in seen.values():
        for view, score in views:
            check(inner, view, score)
    assert [view.keys.shape[2] for view, _ in seen[0]] == [16, 20, 20, 20]
    assert [layer[0][0][-4:] for layer in kept(cache)] == [[36, 37, 38, 39]] * 4
    assert compressed_layers(cache)[0].lengths.tolist() == [[12, 12]]


def test_padding_and_short_texts_change_nothing():
    assert_each_text_is_as_if_alone(PRESS)
    assert_each_text_is_as_if_alone(RKVPress(0.5, window_size=64))


def test_turns_of_different_lengths_change_nothing():
    assert_second_turns_are_as_if_alone(PRESS)


def test_short_texts_have_finite_scores():
    for name in ("llama", "gpt_oss"):
        for n in (2, 4, 5):
            press, seen = recording(PRESS)
            cache = pressed(tiny(name), press, tokens(n))
            assert all(score.isfinite().all() for [(_, score)] in seen.values())
            assert kept(cache)[0][0] == [list(range(n - n // 2, n))] * 2


def test_bf16_is_scored_in_float32():
    press, seen = recording(PRESS)
    pressed(tiny().bfloat16(), press, tokens(20))
    for [(view, score)] in seen.values():
        check(press, view, score)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, "window_size: got 0, wanted a whole number"),
        ({"kernel_size": 2}, "kernel_size: got 2, wanted an odd number"),
        ({"mix_lambda": 1.5}, "mix_lambda: got 1.5, wanted a number from 0 to 1"),
        ({"threshold": "high"}, "threshold: got 'high', wanted a number from 0 to 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(cp.CachepressError, match=message):
        RKVPress(0.5, **options)
