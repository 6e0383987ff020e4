from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.presses.noncausal import NonCausalAttnPress, standardised
from tests.bounds import EXACT, close, near
from tests.tiny import exact_tiny as tiny
from tests.tiny import randn, tokens
from tests.tiny_cache import forward, kept, pressed

SEEN = {}


class Recording(NonCausalAttnPress):
    def score(self, view):
        SEEN[view.depth] = view, super().score(view), self.token_state(view)
        return SEEN[view.depth][1]


def attention(view, b, h, size, before):
    """What each valid pair received, by column, by loops over queries."""
    rows = [t for t in range(view.valid.shape[-1]) if view.valid[b, h, t]]
    keys = view.keys[b, h].double().numpy()
    queries = view.queries[b, h].double().numpy()  # [G, Q, D]
    g, q, _ = queries.shape
    first = view.valid.shape[-1] - q
    received = {t: before.get(t, 0.0) for t in rows}
    for i in range(q):
        if not view.voters[b, i]:
            continue
        chunk = int(view.index[b, h, first + i]) // size
        near = [t for t in rows if int(view.index[b, h, t]) // size == chunk]
        for j in range(g):
            e = np.exp([keys[t] @ queries[j, i] for t in near])
            for t, share in zip(near, e / e.sum(), strict=True):
                received[t] += share / g
    return received


def reference(view, size, before=None):
    """Standardised scores of one sequence by head and column."""
    heads = []
    for h in range(view.keys.shape[1]):
        received = attention(view, 0, h, size, (before or {}).get(h, {}))
        worth = {t: a * float(view.values[0, h, t].norm()) for t, a in received.items()}
        heads.append({t: sum(worth.get(t + d, 0) for d in (-1, 0, 1)) / 3 for t in worth})
    every = np.array([x for head in heads for x in head.values()])
    return [{t: (x - every.mean()) / every.std(ddof=1) for t, x in head.items()} for head in heads]


def check(scores, wanted):
    for h, head in enumerate(wanted):
        for t, x in head.items():
            assert scores[0, h, t] == pytest.approx(x, abs=EXACT, rel=EXACT)


@pytest.mark.parametrize("size", [1, 7, 10, 256])
def test_scores_are_those_of_the_paper(size):
    pressed(tiny(), Recording(0.5, chunk_size=size), tokens(30))
    for view, scores, _ in SEEN.values():
        check(scores, reference(view, size))


def test_values_may_be_of_another_size_and_heads_without_groups():
    press = Recording(0.5, chunk_size=7)
    pressed(tiny("gpt2"), press, tokens(20))
    view = replace(SEEN[1][0], values=randn(1, 4, 20, 5))
    assert view.queries.shape[2] == 1
    check(press.score(view), reference(view, 7))


def test_every_query_shares_out_one():
    pressed(tiny(), Recording(0.5, chunk_size=8), tokens(30))
    for _, _, received in SEEN.values():
        for start in range(0, 30, 8):
            stop = min(start + 8, 30)
            total = received[..., start:stop].sum(-1)
            close(total, torch.full((1, 2), stop - start, dtype=torch.float64))


def test_what_a_pair_received_stays_with_it():
    press, model, ids = Recording(0.5, chunk_size=8), tiny(), tokens(36)
    cache = pressed(model, press, ids[:, :20])
    first = {depth: received for depth, (_, _, received) in SEEN.items()}
    with press(model):
        forward(model, cache, input_ids=ids[:, 20:])
    for depth, (view, scores, _) in SEEN.items():
        assert view.valid.shape[-1] == 10 + 16 and view.queries.shape[-2] == 16
        before = {}
        for h in range(2):
            at = view.index[0, h, :10].tolist()
            before[h] = {t: float(first[depth][0, h, i]) for t, i in enumerate(at)}
        check(scores, reference(view, 8, before))


def test_a_pair_whose_queries_nobody_saw_counts_as_average():
    press, model, ids = Recording(0.5, chunk_size=8), tiny(), tokens(36)
    cache = pressed(model, cp.KnormPress(0.5), ids[:, :20])
    forward(model, cache, input_ids=ids[:, 20:23])
    with press(model):
        forward(model, cache, input_ids=ids[:, 23:])
    view, scores, _ = SEEN[0]
    assert view.valid.shape[-1] == 13 + 13
    old = dict.fromkeys(range(13), 1.0)
    check(scores, reference(view, 8, {0: old, 1: old}))


@pytest.mark.parametrize("first", [Recording(0.5, chunk_size=7), cp.KnormPress(0.5)])
def test_chunks_of_a_padded_text_are_its_own(first):
    """Also in a second turn, and where pairs of the first one are old without a number."""
    model, presses = tiny(), (first, Recording(0.5, chunk_size=7))
    turns = [[tokens(n, seed=n) for n in lengths] for lengths in ((30, 19, 3), (13, 4, 9))]
    cache, masks = DynamicCache(), []
    for press, texts in zip(presses, turns, strict=True):
        width = max(text.shape[1] for text in texts)
        ids = torch.zeros(3, width, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            row[width - text.shape[1] :] = text[0]
        masks.append((ids > 0).long())
        mask = torch.cat(masks, dim=-1)
        rope = (mask.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        with press(model):
            forward(model, cache, input_ids=ids, attention_mask=mask, position_ids=rope)
    batch = {depth: x[1:] for depth, x in SEEN.items()}
    for b in range(3):
        cache = pressed(model, first, turns[0][b])
        with presses[1](model):
            forward(model, cache, input_ids=turns[1][b])
        for depth, (_, *alone) in SEEN.items():
            for ours, wanted in zip(batch[depth], alone, strict=True):
                part = ours[b, :, ours.shape[-1] - wanted.shape[-1] :]
                close(part, wanted[0])


def test_chunked_prefill_sees_every_query():
    model, ids, press = tiny(), tokens(40), NonCausalAttnPress(0.5, chunk_size=16)
    parts = cp.prefill(model, ids, press, chunk_size=7, mode="exact")
    assert kept(parts) == kept(pressed(model, press, ids))


def test_standardised_leaves_out_pairs_that_are_not_valid():
    scores = torch.tensor([[[9.0, 1.0, 2.0], [9.0, 3.0, 6.0]], [[5.0, 5.0, 5.0], [7.0, 7.0, 8.0]]])
    valid = torch.tensor([[[False, True, True]] * 2, [[False, False, True], [False] * 3]])
    wanted = torch.tensor([[0.0, -2.0, -1.0], [0.0, 0.0, 3.0]]) / (14 / 3) ** 0.5
    ours = standardised(scores, valid)
    near(ours[0], wanted, torch.float32, terms=4)
    assert torch.equal(ours[1], torch.zeros(2, 3))


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_bad_options_are_refused(size):
    with pytest.raises(cp.CachepressError, match="chunk_size: got"):
        NonCausalAttnPress(0.5, chunk_size=size)
