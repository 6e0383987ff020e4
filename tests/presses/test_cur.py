from dataclasses import replace

import pytest
import torch

import cachepress as cp
from cachepress.presses.cur import CURPress
from cachepress.ranks import pinned
from tests.bounds import EXACT, close
from tests.tiny import exact_tiny as tiny
from tests.tiny import randn, tokens
from tests.tiny_cache import forward, kept, pressed

SEEN = {}


class Recording(CURPress):
    def score(self, view):
        SEEN[view.depth] = view, super().score(view)
        return SEEN[view.depth][1]


def reference(press, view, b, h):
    """The leverage of each valid pair by index, by plain loops."""
    rows = [t for t in range(view.valid.shape[-1]) if view.valid[b, h, t]]
    index = {t: int(view.index[b, h, t]) for t in rows}

    def leverage(x):
        size = {t: sum(float(c) ** 2 for c in x[b, h, t]) for t in rows}
        if not press.use_local_approximation:
            return size
        window = {t: index[t] // press.local_window_size for t in rows}
        totals = {w: sum(size[t] for t in rows if window[t] == w) for w in window.values()}
        return {t: size[t] / totals[window[t]] for t in rows}

    k, v = leverage(view.keys), leverage(view.values)
    combine = {
        "key": lambda t: k[t],
        "value": lambda t: v[t],
        "kv_avg": lambda t: (k[t] + v[t]) / 2,
        "kv_product": lambda t: k[t] * v[t],
    }[press.leverage_type]
    total = sum(combine(t) for t in rows)
    return {index[t]: combine(t) / total for t in rows}


def check(press, view, scores):
    assert bool(scores.isfinite().all())
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            wanted = reference(press, view, b, h)
            for t in range(scores.shape[2]):
                i = int(view.index[b, h, t])
                if view.valid[b, h, t]:
                    assert bool(pinned(scores)[b, h, t]) == (i < press.num_sinks)
                    if i >= press.num_sinks:
                        assert scores[b, h, t] == pytest.approx(wanted[i], abs=EXACT, rel=EXACT)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("kind", ["key", "value", "kv_avg", "kv_product"])
def test_scores_are_shares_of_squared_norms(kind, local):
    press = Recording(
        0.5,
        num_sinks=2,
        leverage_type=kind,
        use_local_approximation=local,
        local_window_size=6,
    )
    pressed(tiny(), press, tokens(27))
    for view, scores in SEEN.values():
        check(press, view, scores)
    wide = replace(SEEN[0][0], values=randn(1, 2, 27, 5))
    check(press, wide, press.score(wide))


def test_a_further_turn_measures_windows_by_the_pairs_that_are_left():
    press, model, ids = Recording(0.5, local_window_size=5), tiny(), tokens(40)
    cache = pressed(model, press, ids[:, :23])
    with press(model):
        forward(model, cache, input_ids=ids[:, 23:])
    view, scores = SEEN[2]
    assert view.valid.shape[-1] == 11 + 17
    check(press, view, scores)


def test_padding_changes_nothing():
    press, model = Recording(0.5, num_sinks=1, local_window_size=5), tiny()
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


def test_random_leverage_is_a_squared_norm_of_a_projection():
    """It obeys the parallelogram law, which holds for every quadratic form."""
    press = Recording(0.5, 0, "key", use_random_leverage=True, use_local_approximation=False)
    pressed(tiny(), press, tokens(4))
    view = SEEN[0][0]
    x, y = randn(2, 1, 1, 8).expand(2, 1, 2, 8)
    four = replace(view, keys=torch.stack([x, y, x + y, x - y], dim=2))
    shares = press.score(four)[0]  # [H, 4]
    close(shares[:, 2:].sum(-1), 2 * shares[:, :2].sum(-1))
    plain = replace(press, use_random_leverage=False).score(four)[0]
    assert (shares - plain).abs().max() > 1e-3
    assert torch.equal(press.score(four)[0], shares)
    assert not torch.equal(shares[0], shares[1])
    assert not torch.equal(press.score(replace(four, layer=7))[0], shares)


def test_random_leverage_keeps_lengths_on_average_and_projects_values_by_another_matrix():
    press = CURPress(0.5, 0, "value", use_random_leverage=True, use_local_approximation=False)
    pressed(tiny(), Recording(0.5), tokens(2))
    view, x = SEEN[0][0], randn(1, 2, 2, 8)
    by_layer = torch.stack(
        [press.score(replace(view, values=x, layer=n))[0, 0, 0] for n in range(300)]
    )
    wanted = x[0, 0, 0].square().sum() / x[0, 0].square().sum()
    # A mean of independent draws is off by more than 5 of its errors once in a million times; a
    # share of two lengths is off by what both vary by, and no more than that.
    error = by_layer.std() / len(by_layer) ** 0.5
    assert abs(by_layer.mean() - wanted) < 5 * error + by_layer.var()
    same = replace(view, keys=x, values=x)
    keys = replace(press, leverage_type="key")
    assert not torch.allclose(keys.score(same), press.score(same))


def test_zeros_and_single_tokens():
    press = Recording(0.5, num_sinks=0, local_window_size=3)
    pressed(tiny(), press, tokens(6))
    view = SEEN[0][0]
    zeros = replace(view, keys=torch.zeros_like(view.keys))
    assert torch.equal(press.score(zeros), torch.zeros(1, 2, 6))
    assert kept(pressed(tiny(), press, tokens(1)))[0][0][0] == [0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_sinks": -1}, "num_sinks: got -1, wanted a whole number of at least 0"),
        ({"local_window_size": 0}, "local_window_size: got 0"),
        ({"leverage_type": "kv"}, "leverage_type: got 'kv', wanted one of key, value, kv_avg, kv"),
        ({"leverage_type": ["key"]}, "leverage_type: got \\['key'\\]"),
        ({"use_random_leverage": 1}, "use_random_leverage: got 1, wanted True or False"),
        ({"use_local_approximation": None}, "use_local_approximation: got None"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(cp.CachepressError, match=said):
        CURPress(0.5, **options)
