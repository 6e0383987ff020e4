from dataclasses import replace

import numpy as np
import pytest
import torch

import cachepress as cp
from cachepress.presses.cap import CapPress
from cachepress.ranks import pinned
from cachepress.view import EVERY, Needs
from tests.bounds import EXACT, close
from tests.tiny import exact_tiny as tiny
from tests.tiny import randn, tokens
from tests.tiny_cache import forward, kept, pressed

SEEN = {}


class Recording(CapPress):
    @property
    def needs(self):
        return super().needs | Needs(queries=EVERY)

    def score(self, view):
        SEEN[view.depth] = view, super().score(view)
        return SEEN[view.depth][1]


def anchors(view, b, press):
    """The mean query before RoPE under each of the rotations to come, by KV head and group."""
    q = view.queries.shape[-2]
    rope, index = view.rope[b, 0, -q:], view.index[b, 0, -q:]
    counted = view.voters[b] & (index >= press.n_sink)
    found = []
    for head in view.queries[b].flatten(0, 1):
        rows = [
            view.rotary(x[None, None], p.view(1, 1), inverse=True)[0, 0]
            for x, p, c in zip(head, rope, counted, strict=True)
            if c
        ]
        mean = torch.stack(rows).mean(0) if rows else torch.zeros(head.shape[-1])
        first = int(view.next_position[b])
        ahead = range(first, first + press.n_future_positions)
        turned = [view.rotary(mean[None, None], torch.tensor([[p]]))[0, 0] for p in ahead]
        found.append(torch.stack(turned).mean(0).double().numpy())
    return found


def reference(press, view, b, h):
    """The paper's formula for the pairs of a head that are not sinks, by column."""
    g = view.queries.shape[2]
    rows = [
        t
        for t in range(view.valid.shape[-1])
        if view.valid[b, h, t] and view.index[b, h, t] >= press.n_sink
    ]
    keys, values = view.keys[b, h].double().numpy(), view.values[b, h].double().numpy()
    total = dict.fromkeys(rows, 0.0)
    for query in anchors(view, b, press)[h * g : (h + 1) * g]:
        length = np.linalg.norm(query) or 1.0
        cosine = {t: keys[t] @ query / np.linalg.norm(keys[t]) / length for t in rows}
        w = {t: np.exp(press.tau * c) for t, c in cosine.items()}
        a = np.eye(values.shape[1]) + sum(w[t] * np.outer(values[t], values[t]) for t in rows)
        for t in rows:
            total[t] += w[t] * values[t] @ np.linalg.solve(a, values[t]) / g
    return total


def check(press, view, scores):
    assert bool(scores.isfinite().all())
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            wanted = reference(press, view, b, h)
            for t in range(scores.shape[2]):
                if t in wanted:
                    assert scores[b, h, t] == pytest.approx(wanted[t], abs=EXACT, rel=EXACT)
                assert bool(pinned(scores)[b, h, t]) == (view.index[b, h, t] < press.n_sink)


@pytest.mark.parametrize("tau", [0, 1.0, 5.0])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_are_those_of_the_paper(name, tau):
    press = Recording(0.5, tau=tau, n_future_positions=9, n_sink=3)
    pressed(tiny(name), press, tokens(24))
    for view, scores in SEEN.values():
        check(press, view, scores)
    wide = replace(SEEN[0][0], values=randn(*SEEN[0][0].values.shape[:3], 5))
    check(press, wide, press.score(wide))


def test_a_text_longer_than_a_block_is_scored_as_a_whole(monkeypatch):
    press = Recording(0.5, n_future_positions=2)
    pressed(tiny(), press, tokens(30))
    view, scores = SEEN[0]
    monkeypatch.setattr("cachepress.ops.blockwise.AT_ONCE", 7 * view.values[:, :, :1].numel() * 2)
    close(press.score(view), scores)


def test_a_further_turn_has_an_anchor_of_its_own():
    press, model, ids = Recording(0.5, n_future_positions=5), tiny(), tokens(40)
    cache = pressed(model, press, ids[:, :23])
    with press(model):
        forward(model, cache, input_ids=ids[:, 23:])
    view, scores = SEEN[2]
    assert view.valid.shape[-1] == 11 + 17 and view.queries.shape[-2] == 17
    check(press, view, scores)


def test_padding_changes_nothing():
    press, model = Recording(0.5, n_future_positions=5), tiny()
    texts = [tokens(n, seed=n) for n in (33, 21, 3)]
    ids = torch.zeros(3, 33, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[33 - text.shape[1] :] = text[0]
    mask = (ids > 0).long()
    rope = (mask.cumsum(-1) - 1).clamp(min=0)
    pressed(model, press, ids, attention_mask=mask, position_ids=rope)
    batch = dict(SEEN)
    for b, text in enumerate(texts):
        pressed(model, press, text)
        for depth, (_, scores) in SEEN.items():
            ours = batch[depth][1][b, :, 33 - text.shape[1] :]
            close(ours, scores[0])


def test_the_formula_holds_for_a_large_tau_and_stays_finite_for_any():
    press = Recording(0.5, tau=12.0, n_future_positions=5, epsilon=1e-9)
    pressed(tiny(), press, tokens(24))
    view, scores = SEEN[1]
    check(press, view, scores)
    for tau in (100, 1e6):
        score = replace(press, tau=tau, epsilon=1e-6).score(view)
        free = score[~pinned(score)]
        assert bool(free.isfinite().all()) and free.max() <= 1 and free.min() >= 0


def test_of_pairs_with_like_values_few_stay():
    """Nine pairs say the same, one says something else: the one is worth more than each of them."""
    press = Recording(0.5, tau=0, n_sink=0)
    pressed(tiny(), press, tokens(10))
    values = torch.zeros(1, 2, 10, 8, dtype=torch.float64)
    values[:, :, :9, 0] = values[:, :, 9, 1] = 3
    scores = press.score(replace(SEEN[0][0], values=values))[0, 0]
    close(scores[:9], torch.full((9,), 9 / (1 + 9 * 9), dtype=torch.float64))
    assert scores[9] == pytest.approx(9 / (1 + 9))


def test_a_text_of_sinks_keeps_the_first():
    assert kept(pressed(tiny(), CapPress(0.5), tokens(4)))[0][0][0] == [0, 1]
    assert kept(pressed(tiny(), CapPress(0.5), tokens(1)))[0][0][0] == [0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": -1}, "tau: got -1, wanted a number >= 0"),
        ({"tau": float("nan")}, "tau: got nan"),
        ({"tau": "5"}, "tau: got '5'"),
        ({"n_future_positions": 0}, "n_future_positions: got 0"),
        ({"n_sink": -1}, "n_sink: got -1, wanted a whole number of at least 0"),
        ({"epsilon": 0}, "epsilon: got 0, wanted a number > 0"),
        ({"epsilon": True}, "epsilon: got True"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(cp.CachepressError, match=said):
        CapPress(0.5, **options)
