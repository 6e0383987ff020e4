"""SnapKV against the paper's algorithm, written out with loops."""

from math import exp, tanh

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.presses.pyramidkv import PyramidKVPress
from cachepress.presses.snapkv import SnapKVPress
from cachepress.ranks import pinned
from tests.bounds import close
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward, kept, pressed


def recording(press):
    """A press of the same kind and options, and what it saw and answered in each layer."""
    seen = {}

    class Recording(type(press)):
        def score(self, view):
            score = super().score(view)
            seen.setdefault(view.depth, []).append((view, score))
            return score

    return Recording(**vars(press)), seen


def left_padded(texts):
    """Texts of ``[1, n]`` in one batch, and the mask of what is text."""
    longest = max(text.shape[1] for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[longest - text.shape[1] :] = text[0]
    return ids, (ids > 0).long()


def assert_each_text_is_as_if_alone(press, lengths=(31, 12, 5, 1), model=None):
    model = model or tiny()
    texts = [tokens(n, seed=n) for n in lengths]
    ids, mask = left_padded(texts)
    batch = cp.prefill(model, ids, press, attention_mask=mask)
    for i, text in enumerate(texts):
        pad = ids.shape[1] - text.shape[1]
        found = [[[p - pad for p in head] for head in layer[i]] for layer in kept(batch)]
        assert found == [layer[0] for layer in kept(cp.prefill(model, text, press))]


def two_turns(model, press, first, second):
    """A cache after two turns of left-padded texts."""
    cache, masks = DynamicCache(), []
    with press(model):
        for texts in (first, second):
            ids, mask = left_padded(texts)
            seen = sum(m.sum(-1, keepdim=True) for m in masks)
            masks.append(mask)
            rope = (mask.cumsum(-1) - 1).clamp(min=0) + seen
            forward(
                model,
                cache,
                input_ids=ids,
                attention_mask=torch.cat(masks, dim=-1),
                position_ids=rope,
            )
    return cache, torch.cat(masks, dim=-1)


def assert_second_turns_are_as_if_alone(press, model=None):
    """Turns of different lengths, in a batch and each alone."""
    model = model or tiny()
    first = [tokens(n, seed=n) for n in (31, 18, 25)]
    second = [tokens(n, seed=n) for n in (3, 14, 1)]
    batch, mask = two_turns(model, press, first, second)
    own = mask.cumsum(-1) - 1
    for i in range(3):
        alone, _ = two_turns(model, press, first[i : i + 1], second[i : i + 1])
        for layer, layer_alone in zip(kept(batch), kept(alone), strict=True):
            assert [own[i][head].tolist() for head in layer[i]] == layer_alone[0]


def weights_of(view, layer, b, h, g, q, softcap=None, sinks=None):
    """Attention of one query over the pairs of the view, a list of floats."""
    queries, keys = view.queries.double(), view.keys.double()
    t = keys.shape[2]
    last = t - queries.shape[-2] + q
    logits = []
    for i in range(t):
        x = float(queries[b, h, g, q] @ keys[b, h, i]) * view.rule.scaling
        x = softcap * tanh(x / softcap) if softcap else x
        logits.append(x if i <= last and view.valid[b, h, i] else None)
    total = sum(exp(x) for x in logits if x is not None)
    if sinks is not None:
        total += exp(float(sinks[layer][h * queries.shape[2] + g]))
    return [0.0 if x is None else exp(x) / total for x in logits]


def eager(name):
    """The tiny model with the attention that knows softcaps; some versions prefer another."""
    model = tiny(name)
    model.set_attn_implementation("eager")
    return model


def extras(name, model):
    """What the architecture adds to attention: the softcap and the sinks, by compressed layer."""
    sinks = None
    if name == "gpt_oss":
        sinks = [layer.self_attn.sinks.detach() for layer in model.model.layers][1::2]
    return getattr(model.config, "attn_logit_softcapping", None), sinks


def transcription(view, depth, window, kernel, pooling, softcap, sinks):
    """Votes of the window, pooled for each query head, averaged over those of a KV head."""
    b, h, g = view.queries.shape[:3]
    t, n = view.keys.shape[2], min(window, view.queries.shape[-2])
    result = view.keys.new_zeros(b, h, t)
    for i in range(b):
        for j in range(h):
            for k in range(g):
                queries = range(view.queries.shape[-2] - n, view.queries.shape[-2])
                rows = [weights_of(view, depth, i, j, k, q, softcap, sinks) for q in queries]
                votes = [sum(row[c] for row in rows) / n for c in range(t - n)]
                for c in range(t - n):
                    near = [
                        votes[x] if 0 <= x < len(votes) else 0.0
                        for x in range(c - kernel // 2, c + kernel // 2 + 1)
                    ]
                    value = max(near) if pooling == "max" else sum(near) / kernel
                    result[i, j, c] += value / g
    return result


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_score_is_that_of_the_paper(name, pooling):
    model = eager(name)
    press, seen = recording(SnapKVPress(0.5, window_size=4, kernel_size=3, pooling=pooling))
    pressed(model, press, tokens(22))
    for depth, [(view, score)] in seen.items():
        wanted = transcription(view, depth, 4, 3, pooling, *extras(name, model))
        close(score[..., :-4], wanted[..., :-4])
        assert pinned(score)[..., -4:].all() and not pinned(score)[..., :-4].any()


def test_max_pooling_keeps_all_neighbours_of_a_peak():
    press, seen = recording(SnapKVPress(0.5, window_size=4, kernel_size=5, pooling="max"))
    cache = pressed(tiny("gpt2"), press, tokens(40))
    for depth, layer in enumerate(kept(cache)):
        [(view, _)] = seen[depth]
        for h, head in enumerate(layer[0]):
            peak = int(view.window_attention(4)[0, h, 0, :36].argmax())
            assert set(range(max(0, peak - 2), min(36, peak + 3))) <= set(head)
    mean = pressed(tiny("gpt2"), SnapKVPress(0.5, window_size=4), tokens(40))
    assert kept(mean) != kept(cache)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_padding_and_short_texts_change_nothing(pooling):
    assert_each_text_is_as_if_alone(SnapKVPress(0.5, window_size=6, pooling=pooling))
    assert_each_text_is_as_if_alone(SnapKVPress(0.5, window_size=64, pooling=pooling))


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_turns_of_different_lengths_change_nothing(pooling):
    assert_second_turns_are_as_if_alone(SnapKVPress(0.5, window_size=6, pooling=pooling))


def test_the_spelling_names_the_pooling_only_where_it_was_chosen():
    spelling = "SnapKVPress(compression_ratio=0.5, window_size=64, kernel_size=5)"
    assert repr(SnapKVPress(0.5)) == spelling
    press = SnapKVPress(0.5, 32, 7, pooling="max")
    assert cp.parse(repr(press)) == press and "pooling='max'" in repr(press)
    assert cp.parse("SnapKVPress(0.5, pooling='max')").pooling == "max"


def test_pyramidkv_has_its_options_where_they_were():
    press = PyramidKVPress(0.5, 6, 3, 4)
    assert (press.window_size, press.kernel_size, press.beta, press.pooling) == (6, 3, 4, "avg")
    most = PyramidKVPress(0.5, 6, 3, 4, pooling="max")
    assert cp.parse(repr(most)) == most
    model, ids = tiny(), tokens(60)
    mean, high = (kept(pressed(model, p, ids)) for p in (press, most))
    lengths = [[len(head) for row in layer for head in row] for layer in mean]
    assert lengths == [[len(head) for row in layer for head in row] for layer in high]
    assert mean != high


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "mean"}, 'pooling: got \'mean\', wanted "avg" or "max"'),
        ({"pooling": None}, "pooling: got None, wanted"),
        ({"kernel_size": 4}, "kernel_size: got 4, wanted an odd number"),
        ({"kernel_size": 0}, "kernel_size: got 0, wanted a whole number"),
        ({"window_size": 0}, "window_size: got 0, wanted a whole number"),
    ],
)
def test_bad_options_are_refused(options, message):
    for kind in (SnapKVPress, PyramidKVPress):
        with pytest.raises(cp.CachepressError, match=message):
            kind(0.5, **options)
