from dataclasses import replace

import numpy as np
import pytest
import torch

import cachepress as cp
from cachepress.presses.compactor import CompactorPress
from cachepress.presses.leverage import gaussian
from cachepress.ranks import pinned
from tests.bounds import EXACT, close, near
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward, kept, pressed

SEEN = {}
SMALL = {"sink_size_start": 3, "sink_size_end": 2, "chunk_size": 7, "sketch_dimension": 5}


class Recording(CompactorPress):
    def score(self, view):
        SEEN[view.depth] = view, super().score(view), self.token_state(view)
        return SEEN[view.depth][1]


def free_columns(press, view):
    """Columns of the pairs that are not pinned, of one sequence without padding, by head."""
    end = int(view.n_seen) - press.sink_size_end
    heads = view.index[0].tolist()
    return [[t for t, i in enumerate(h) if press.sink_size_start <= i < end] for h in heads]


def received(press, view, h, rows, before):
    """Attention within chunks that are counted from the first pair not pinned."""
    first = view.keys.shape[2] - view.queries.shape[-2]
    chunk = {
        t: (int(view.index[0, h, t]) - press.sink_size_start) // press.chunk_size for t in rows
    }
    total = {t: before.get(t, 0.0) for t in rows}
    for t in rows:
        near = [u for u in rows if chunk[u] == chunk[t]]
        if t < first:
            continue
        for query in view.queries[0, h, :, t - first].double().numpy():
            e = np.exp([view.keys[0, h, u].double().numpy() @ query for u in near])
            for u, share in zip(near, e / e.sum(), strict=True):
                total[u] += share / view.queries.shape[2]
    return total


def standard(heads):
    every = np.concatenate([np.array(list(head.values())) for head in heads])
    return [{t: (x - every.mean()) / every.std(ddof=1) for t, x in h.items()} for h in heads]


def reference(press, view, weight, before=None):
    """The blend by head and column."""
    attention, leverage = [], []
    matrix = gaussian(view, 8, press.sketch_dimension, 0).double()
    for h, rows in enumerate(free_columns(press, view)):
        total = received(press, view, h, rows, (before or {}).get(h, {}))
        worth = {t: a * float(view.values[0, h, t].norm()) for t, a in total.items()}
        attention.append({t: sum(worth.get(t + d, 0) for d in (-1, 0, 1)) / 3 for t in rows})
        bare = [
            view.rotary(view.keys[:, h, t : t + 1], view.rope[:, h, t : t + 1], inverse=True)[0, 0]
            for t in rows
        ]
        x = (torch.stack(bare).double() @ matrix[h]).numpy()
        x = x - x.mean(0)
        hat = x @ np.linalg.inv(x.T @ x + 0.01 * np.eye(x.shape[1])) @ x.T
        leverage.append(dict(zip(rows, np.diag(hat), strict=True)))
    blend = zip(standard(attention), standard(leverage), strict=True)
    return [{t: a[t] + weight * lev[t] for t in a} for a, lev in blend]


def check(press, view, scores, weight, before=None):
    for h, head in enumerate(reference(press, view, weight, before)):
        for t in range(scores.shape[-1]):
            assert bool(pinned(scores)[0, h, t]) == (t not in head)
            if t in head:
                assert scores[0, h, t] == pytest.approx(head[t], abs=EXACT, rel=EXACT)


@pytest.mark.parametrize("blending", [0, 0.35, 2])
def test_scores_are_the_blend_of_both_halves_between_the_pinned_pairs(blending):
    press = Recording(0.5, **SMALL, blending=blending)
    pressed(tiny(), press, tokens(30))
    for view, scores, _ in SEEN.values():
        check(press, view, scores, blending)


def test_blending_is_by_default_the_fraction_removed():
    press = Recording(0.3, **SMALL)
    pressed(tiny(), press, tokens(31))
    view, scores, _ = SEEN[0]
    check(press, view, scores, 1 - 21 / 31)
    pressed(tiny(), Recording(0.0, n_kept=10, **SMALL), tokens(31))
    view, scores, _ = SEEN[0]
    check(press, view, scores, 1 - 10 / 31)
    zero = replace(view, n_kept=torch.tensor([31]))
    check(press, zero, press.score(zero), 0)


def test_a_further_turn_adds_to_what_pairs_received():
    """Pairs that were pinned as the newest are not any more, and count as average."""
    press, model, ids = Recording(0.5, **SMALL), tiny(), tokens(41)
    cache = pressed(model, press, ids[:, :22])
    first = {depth: token_state for depth, (_, _, token_state) in SEEN.items()}
    with press(model):
        forward(model, cache, input_ids=ids[:, 22:])
    for depth, (view, scores, _) in SEEN.items():
        assert view.valid.shape[-1] == 11 + 19
        before = {}
        for h in range(2):
            assert {0, 1, 2, 20, 21} <= set(view.index[0, h, :11].tolist())
            known = {t: float(first[depth][0, h, int(view.index[0, h, t])]) for t in range(11)}
            before[h] = {t: 1.0 if np.isnan(x) else x for t, x in known.items()}
            assert [t for t, x in known.items() if np.isnan(x)] == [0, 1, 2, 9, 10]
        check(press, view, scores, 1 - 20 / 41, before)


def test_padding_changes_nothing():
    press, model = Recording(0.5, **SMALL), tiny()
    texts = [tokens(n, seed=n) for n in (33, 21, 6, 2)]
    ids = torch.zeros(4, 33, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[33 - text.shape[1] :] = text[0]
    mask = (ids > 0).long()
    rope = (mask.cumsum(-1) - 1).clamp(min=0)
    pressed(model, press, ids, attention_mask=mask, position_ids=rope)
    batch = dict(SEEN)
    for b, text in enumerate(texts):
        pressed(model, press, text)
        for depth, single in SEEN.items():
            for ours, alone in zip(batch[depth][1:], single[1:], strict=True):
                part = ours[b, :, 33 - text.shape[1] :]
                close(part, alone[0])


def test_pinned_pairs_yield_to_the_budget_first_ones_last():
    press = CompactorPress(0.5)
    assert kept(pressed(tiny(), press, tokens(14)))[0][0][0] == list(range(7))
    assert kept(pressed(tiny(), press, tokens(20)))[0][0][0] == [*range(8), 18, 19]
    assert kept(pressed(tiny(), press, tokens(1)))[0][0][0] == [0]
    none = kept(pressed(tiny(), Recording(0.5, 0, 0, chunk_size=8), tokens(20)))
    assert not bool(pinned(SEEN[0][1]).any()) and len(none[0][0][0]) == 10


def test_half_precision_is_scored_in_single():
    model = tiny().bfloat16()
    press = Recording(0.5, **SMALL)
    pressed(model, press, tokens(30))
    view, scores, _ = SEEN[0]
    assert view.keys.dtype == torch.bfloat16 and scores.dtype == torch.float32
    names = ("keys", "values", "queries")
    single = replace(view, **{name: getattr(view, name).float() for name in names})
    free = ~pinned(scores)
    near(press.score(single)[free], scores[free], torch.float32, terms=2 * 8 + 6 + 4 * 30)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sink_size_start": -1}, "sink_size_start: got -1, wanted a whole number of at least 0"),
        ({"sink_size_end": 1.5}, "sink_size_end: got 1.5"),
        ({"chunk_size": 0}, "chunk_size: got 0, wanted a whole number of at least 1"),
        ({"sketch_dimension": 0}, "sketch_dimension: got 0"),
        ({"blending": -0.1}, "blending: got -0.1, wanted a number >= 0, or None"),
        ({"blending": float("nan")}, "blending: got nan"),
        ({"blending": True}, "blending: got True"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(cp.CachepressError, match=said):
        CompactorPress(0.5, **options)
