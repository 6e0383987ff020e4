"""ChunkKV against a plain transcription, with lists."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.pairs import PairBytes
from cachepress.ops import AttentionRule
from cachepress.presses.chunkkv import ChunkKVPress
from cachepress.ranks import pin_sinks, pin_window
from cachepress.view import LayerView
from tests.tiny import exact_tiny as tiny
from tests.tiny import rand, randn, tokens
from tests.tiny_cache import forward, kept, pressed


@dataclass(frozen=True)
class Given(cp.ScorerPress):
    """Answers scores that the test made up, with some pairs pinned."""

    scores: Tensor = field(default_factory=lambda: torch.zeros(0))
    sinks: int = 0
    window: int = 0

    def score(self, view):
        return pin_sinks(pin_window(self.scores, view, self.window), view, self.sinks)


def table(scores, n_kept, lengths=None):
    """A view of sequences of the given lengths, padded on the left to ``scores [B, H, T]``."""
    b, h, t = scores.shape
    lengths = torch.tensor(lengths or [t] * b)
    index = (torch.arange(t) - (t - lengths)[:, None])[:, None].expand(b, h, t)
    keys = torch.zeros(b, h, t, 4)
    return LayerView(
        keys=keys,
        values=keys,
        positions=torch.arange(t).expand(b, h, t),
        index=index,
        rope=index,
        valid=index >= 0,
        n_seen=lengths,
        n_kept=torch.as_tensor(n_kept).expand(b),
        next_position=lengths,
        layer=0,
        depth=0,
        n_layers=1,
        pair_bytes=PairBytes(0, 0),
        rule=AttentionRule(1.0),
    )


def chosen(press, view):
    """What the press's own budget keeps, as lists of own indices by sequence and head."""
    mask = press.budget.select(press.score(view), view.valid, view.n_kept)
    return [
        [view.index[b, h][mask[b, h]].tolist() for h in range(mask.shape[1])]
        for b in range(len(mask))
    ]


def transcription(scores, length, budgets, pinned=()):
    """The pairs of each head: ``scores`` holds a dictionary from own index to score per head."""
    rows = sorted({i for head in scores for i in head} - set(pinned))

    def mean(some):
        values = [head[i] for i in some for head in scores if i in head]
        return sum(values) / len(values)

    chunks = {}
    for i in rows:
        chunks.setdefault(i // length, []).append(i)
    ranked = sorted(chunks, key=lambda c: (mean(chunks[c]), c), reverse=True)
    order = list(pinned)
    for c in ranked:
        order += sorted(chunks[c], key=lambda i: (mean([i]), i), reverse=True)
    return [
        sorted([i for i in order if i in head][:n]) for head, n in zip(scores, budgets, strict=True)
    ]


def heads_of(scores, length):
    t = scores.shape[-1]
    return [{i: float(head[t - length + i]) for i in range(length)} for head in scores.double()]


@pytest.mark.parametrize("n_kept", [1, 3, 10, 17, 29])
@pytest.mark.parametrize("length", [1, 4, 5, 40])
def test_keeps_whole_chunks_and_the_best_pairs_of_the_last(length, n_kept):
    scores = randn(1, 3, 31, generator=torch.Generator().manual_seed(n_kept))
    press = ChunkKVPress(Given(0.5, scores=scores), chunk_length=length)
    wanted = transcription(heads_of(scores[0], 31), length, [n_kept] * 3)
    assert chosen(press, table(scores, n_kept)) == [wanted]
    assert wanted[0] == wanted[1] == wanted[2] and len(wanted[0]) == n_kept


def test_by_hand():
    scores = torch.tensor([[[0.0, 9.0, 4.0, 4.0, 5.0, 5.0, 1.0, 1.0]]])
    press = ChunkKVPress(Given(0.5, scores=scores), chunk_length=2)
    assert chosen(press, table(scores, 4)) == [[[0, 1, 4, 5]]]
    assert chosen(press, table(scores, 3)) == [[[1, 4, 5]]]
    assert chosen(press, table(scores, 5)) == [[[0, 1, 3, 4, 5]]]
    assert chosen(press, table(torch.zeros(1, 1, 8), 3)) == [[[1, 4, 5]]]


def test_of_equal_chunks_the_newest_stay():
    press = ChunkKVPress(Given(0.5, scores=torch.zeros(1, 2, 9)), chunk_length=2)
    assert chosen(press, table(torch.zeros(1, 2, 9), 4)) == [[[5, 6, 7, 8]] * 2]


def test_each_sequence_chooses_its_own_chunks_whatever_the_padding():
    scores = randn(3, 2, 24, generator=torch.Generator().manual_seed(1))
    lengths, counts = [24, 17, 3], [11, 8, 2]
    press = ChunkKVPress(Given(0.5, scores=scores), chunk_length=4)
    found = chosen(press, table(scores, counts, lengths))
    wanted = [transcription(heads_of(scores[b], lengths[b]), 4, [counts[b]] * 2) for b in range(3)]
    assert found == wanted
    assert found[0] != found[1]


def test_pinned_pairs_stay_first_and_do_not_count_in_their_chunk():
    scores = rand(1, 2, 20, generator=torch.Generator().manual_seed(2))
    press = ChunkKVPress(Given(0.5, scores=scores, sinks=2, window=3), chunk_length=4)
    wanted = transcription(heads_of(scores[0], 20), 4, [9, 9], pinned=[0, 1, 19, 18, 17])
    assert chosen(press, table(scores, 9)) == [wanted]
    assert chosen(press, table(scores, 4)) == [[[0, 1, 18, 19]] * 2]


def test_heads_that_hold_different_pairs_share_one_ranking():
    scores = randn(1, 2, 12, generator=torch.Generator().manual_seed(3))
    view = table(scores, 4)
    index = torch.tensor([[0, 1, 2, 4, 5, 9, 10, 11, 12, 15, 18, 19], [*range(8, 20)]])
    view = replace(view, index=index[None], n_seen=torch.tensor([20]))
    heads = [dict(zip(index[h].tolist(), scores[0, h].tolist(), strict=True)) for h in range(2)]
    press = ChunkKVPress(Given(0.5, scores=scores), chunk_length=3)
    assert chosen(press, view) == [transcription(heads, 3, [4, 4])]


def test_heads_with_budgets_of_their_own_go_down_the_same_ranking():
    scores = rand(1, 2, 20, generator=torch.Generator().manual_seed(4))
    scores[:, 1] += 0.3
    inner = cp.AdaKVPress(Given(0.5, scores=scores), alpha_safeguard=0.2)
    view = table(scores, 8)
    budgets = [len(head) for head in chosen(inner, view)[0]]
    press = ChunkKVPress(inner, chunk_length=4)
    assert chosen(press, view) == [transcription(heads_of(scores[0], 20), 4, budgets)]
    assert sum(budgets) == 16 and budgets[0] < budgets[1]


def test_shares_pairs_over_the_heads_of_a_model_and_over_turns():
    model, ids = tiny(), tokens(41, batch=2)
    press = ChunkKVPress(cp.SnapKVPress(0.5, window_size=6), chunk_length=5)
    cache = DynamicCache()
    with press(model):
        forward(model, cache, input_ids=ids[:, :25])
        assert [len(head) for layer in kept(cache) for row in layer for head in row] == [12] * 16
        forward(model, cache, input_ids=ids[:, 25:])
    for layer in kept(cache):
        for first, second in layer:
            assert first == second and len(first) == 20 and first[-6:] == list(range(35, 41))
    assert kept(cache)[0][0] != kept(cache)[0][1]


def test_a_text_shorter_than_a_chunk_is_cut_by_the_mean_score_of_its_pairs():
    seen = {}

    class Recording(cp.KnormPress):
        def score(self, view):
            seen[view.depth] = super().score(view)
            return seen[view.depth]

    cache = pressed(tiny(), ChunkKVPress(Recording(0.5), chunk_length=50), tokens(12))
    for depth, layer in enumerate(kept(cache)):
        best = seen[depth][0].mean(0).argsort(descending=True)[:6].sort().values.tolist()
        assert layer[0] == [best, best]


def test_works_inside_chunks_and_blocks():
    model, ids = tiny(), tokens(40)
    press = ChunkKVPress(cp.KnormPress(0.5), chunk_length=3)
    for outer in (cp.ChunkPress(press, 10), cp.BlockPress(press, 10)):
        for layer in kept(pressed(model, outer, ids)):
            assert [len(head) for head in layer[0]] == [20, 20] and layer[0][0] == layer[0][1]


@pytest.mark.parametrize("length", [0, -3, 2.5, True])
def test_a_bad_chunk_length_is_refused(length):
    with pytest.raises(cp.CachepressError, match=f"chunk_length: got {length}, wanted a whole"):
        ChunkKVPress(cp.KnormPress(0.5), chunk_length=length)


def test_a_model_wide_budget_is_refused():
    with pytest.raises(cp.CachepressError, match="ChunkKVPress chooses layer by layer"):
        ChunkKVPress(cp.AdaKVPress(cp.KnormPress(0.5), scope="model"))
