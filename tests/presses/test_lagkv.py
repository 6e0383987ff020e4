from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import cachepress as cp
from cachepress.presses.lagkv import LagKVPress
from cachepress.ranks import pinned
from tests.bounds import EXACT, close
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward, kept, pressed

GOLDEN = Path(__file__).parents[1] / "golden"
SEEN = {}


class Recording(LagKVPress):
    def score(self, view):
        SEEN[view.depth] = view, super().score(view)
        return SEEN[view.depth][1]


def spread(rows, reference):
    """Softmax over pairs of the deviation over channels, each scaled by a reference's range."""
    low, high = reference.min(0), reference.max(0)
    scaled = np.where(high > low, (rows - low) / np.where(high > low, high - low, 1), 0)
    deviation = scaled.std(1, ddof=1)
    e = np.exp(deviation - deviation.max())
    return e / e.sum()


def reference(press, view, b, h):
    """Scores of the free pairs by index, and the pairs that always stay, by loops over parts."""
    valid = view.valid[b, h].tolist()
    index = [int(i) for i, v in zip(view.index[b, h], valid, strict=True) if v]
    keys, values = (x[b, h][view.valid[b, h]].double().numpy() for x in (view.keys, view.values))
    n, size = int(view.n_seen[b]), press.lag_size
    whole = (n - press.n_sink) // size
    scores, stay = {}, [i for i in index if i < press.n_sink]

    def of(part):
        start = press.n_sink + part * size
        return [t for t, i in enumerate(index) if start <= i < start + size]

    for part in range(max(0, whole - 1)):
        rows = of(part)
        after = of(part + 1) or rows
        if not rows:
            continue
        total = (spread(keys[rows], keys[after]) + spread(values[rows], values[after])) / 2
        if not press.cross_scoring:
            places = np.argsort(np.argsort(total, kind="stable"), kind="stable")
            total = (size - len(rows) + places) / size
        scores |= dict(zip([index[t] for t in rows], total.tolist(), strict=True))
    tail = press.n_sink + max(0, whole - 1) * size
    return scores, [*stay, *(i for i in index if i >= tail)]


def check(press, view, scores):
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            wanted, stay = reference(press, view, b, h)
            for t in range(scores.shape[2]):
                i = int(view.index[b, h, t])
                if view.valid[b, h, t] and i in wanted:
                    assert scores[b, h, t] == pytest.approx(wanted[i], abs=EXACT, rel=EXACT)
                assert not view.valid[b, h, t] or bool(pinned(scores)[b, h, t]) == (i in stay)


def test_keeps_the_pairs_of_the_reference_up_to_ties():
    """Parts tie at the last place that fits: the reference keeps any such pair, we the newest."""
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama_model").eval()
    ids = torch.from_numpy(np.load(GOLDEN / "ids.npy")).view(1, -1)
    golden = np.load(GOLDEN / "lagkv_0.5.npz")
    cache = pressed(model, Recording(0.5, n_sink=4, lag_size=32), ids)
    for layer, rows in enumerate(kept(cache)):
        masks = np.unpackbits(golden[f"mask_{layer}"], axis=-1)[0]
        for ours, mask, scores in zip(rows[0], masks, SEEN[layer][1][0].tolist(), strict=True):
            wanted = np.nonzero(mask)[0].tolist()
            last = min(scores[i] for i in wanted)
            tied = [i for i in range(256) if scores[i] == last]
            above = set(wanted) - set(tied)
            assert len(tied) == 6 and len(wanted) - len(above) == 4
            assert ours == sorted(above | set(tied[-4:]))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("n", [45, 46, 15, 14])
def test_scores_are_those_of_the_paper(cross, n):
    press = Recording(0.5, n_sink=3, lag_size=6, cross_scoring=cross)
    pressed(tiny(), press, tokens(n))
    for view, scores in SEEN.values():
        check(press, view, scores)


@pytest.mark.parametrize("cross", [False, True])
def test_a_further_turn_is_scored_by_the_pairs_that_are_left(cross):
    press, model, ids = (
        Recording(0.6, n_sink=2, lag_size=5, cross_scoring=cross),
        tiny(),
        tokens(61),
    )
    cache = pressed(model, press, ids[:, :33])
    with press(model):
        forward(model, cache, input_ids=ids[:, 33:])
    view, scores = SEEN[0]
    assert view.valid.shape[-1] == 13 + 28
    check(press, view, scores)


def test_compressed_parts_are_spared_by_a_further_turn():
    """The first layer, whose pairs depend on no cache, ends as if the text had come at once."""
    model, ids, press = tiny(), tokens(78), LagKVPress(0.5, n_sink=2, lag_size=4)
    cache = pressed(model, press, ids[:, :42])
    with press(model):
        forward(model, cache, input_ids=ids[:, 42:])
    assert kept(cache)[0] == kept(pressed(model, press, ids))[0]


@pytest.mark.parametrize("cross", [False, True])
def test_padding_changes_nothing(cross):
    press, model = Recording(0.5, n_sink=2, lag_size=5, cross_scoring=cross), tiny()
    texts = [tokens(n, seed=n) for n in (40, 29, 9)]
    ids = torch.zeros(3, 40, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[40 - text.shape[1] :] = text[0]
    mask = (ids > 0).long()
    pressed(model, press, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    batch = {depth: scores for depth, (_, scores) in SEEN.items()}
    for b, text in enumerate(texts):
        pressed(model, press, text)
        for depth, (_, scores) in SEEN.items():
            ours = batch[depth][b, :, 40 - text.shape[1] :]
            close(ours, scores[0])


def test_a_part_whose_next_one_is_gone_is_scaled_by_itself():
    press = Recording(0.5, n_sink=0, lag_size=5)
    pressed(tiny(), press, tokens(30))
    view = SEEN[1][0]
    view = view.only((view.index < 10) | (view.index >= 15))
    assert not bool((view.valid & (view.index // 5 == 2)).any())
    scores = press.score(view)
    assert bool(scores[view.valid].isfinite().all())
    check(press, view, scores)


def test_a_pair_far_below_the_others_of_its_part_is_still_above_the_pairs_that_are_gone():
    press = Recording(0.5, n_sink=0, lag_size=5)
    pressed(tiny(), press, tokens(15))
    view = SEEN[0][0]
    keys, values = view.keys.clone(), view.values.clone()
    keys[:, :, 1, 0] = values[:, :, 1, 0] = 1e6
    view = replace(view, keys=keys, values=values).only((view.index < 2) | (view.index >= 5))
    assert press.score(view)[0, 0, :2].tolist() == pytest.approx([0.6, 0.8])
    check(press, view, press.score(view))


def test_channels_without_range_count_as_zero_and_the_newest_of_equals_is_highest():
    press = Recording(0.5, n_sink=0, lag_size=5)
    pressed(tiny(), press, tokens(15))
    view = SEEN[0][0]
    keys = view.keys.clone()
    keys[..., :3] = 2.5
    flat = replace(view, keys=keys)
    check(press, flat, press.score(flat))
    ones = replace(view, keys=torch.ones_like(view.keys), values=torch.ones_like(view.values))
    wanted = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8], dtype=torch.float64).repeat(2)
    close(press.score(ones)[0, 1, :10], wanted)


def test_a_short_text_keeps_sinks_and_then_the_newest_pairs():
    short = kept(pressed(tiny(), LagKVPress(0.5, n_sink=3, lag_size=6), tokens(14)))
    assert short[0][0][0] == [0, 1, 2, 10, 11, 12, 13]
    assert kept(pressed(tiny(), LagKVPress(0.5), tokens(2)))[0][0][0] == [0]
    assert kept(pressed(tiny(), LagKVPress(0.5), tokens(1)))[0][0][0] == [0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_sink": -1}, "n_sink: got -1, wanted a whole number of at least 0"),
        ({"lag_size": 0}, "lag_size: got 0, wanted a whole number of at least 1"),
        ({"lag_size": 2.5}, "lag_size: got 2.5"),
        ({"cross_scoring": 1}, "cross_scoring: got 1, wanted True or False"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(cp.CachepressError, match=said):
        LagKVPress(0.5, **options)
