"""Entropy-gated ChunkKV against a plain transcription, with lists."""

from math import log

import pytest
import torch

import cachepress as cp
from cachepress.presses.chunkkv import ChunkKVPress
from cachepress.presses.entropy_chunkkv import EntropyGatedChunkKVPress
from tests.presses.test_chunkkv import Given, chosen, table
from tests.tiny import exact_tiny as tiny
from tests.tiny import rand, tokens
from tests.tiny_cache import kept, pressed


def lower_median(numbers):
    return sorted(numbers)[(len(numbers) - 1) // 2]


def transcription(scores, length, few, n_kept, pinned=()):
    """The pairs that every head keeps, of ``scores``, a list of pairs' means over the heads."""
    free = [i for i in range(len(scores)) if i not in pinned]
    lift = min(0.0, *[scores[i] for i in free])
    chunks = {}
    for i in free:
        chunks.setdefault(i // length, []).append(i)

    def entropy(rows):
        lifted = [scores[i] - lift for i in rows]
        if len(rows) == 1:
            return 0.0
        if sum(lifted) == 0:
            return 1.0
        shares = [x / sum(lifted) for x in lifted if x > 0]
        return -sum(p * log(p) for p in shares) / log(len(rows))

    means = {c: sum(scores[i] for i in rows) / len(rows) for c, rows in chunks.items()}
    entropies = {c: entropy(rows) for c, rows in chunks.items()}
    order, cut = list(pinned), []
    for c in sorted(chunks, key=lambda c: (means[c], c), reverse=True):
        rows = sorted(chunks[c], key=lambda i: (scores[i], i), reverse=True)
        good = means[c] >= lower_median(means.values())
        if good and entropies[c] < lower_median(entropies.values()):
            rows, rest = rows[:few], rows[few:]
            cut += rest
        order += rows
    order += sorted(cut, key=lambda i: (scores[i], i), reverse=True)
    return sorted(order[:n_kept])


def spiky(*shape, seed=0):
    x = rand(*shape, generator=torch.Generator().manual_seed(seed))
    return x**8 + x / 100  # Without which the lowest would be as good as equal.


@pytest.mark.parametrize("lift", [0.0, -0.3, -5.0])
@pytest.mark.parametrize("n_kept", [1, 7, 20, 36, 42])
@pytest.mark.parametrize(("length", "few"), [(5, 2), (8, 1), (43, 3)])
def test_cuts_spiky_chunks_and_spends_what_is_freed(length, few, n_kept, lift):
    scores = spiky(1, 2, 43, seed=n_kept) + lift
    press = EntropyGatedChunkKVPress(Given(0.5, scores=scores), length, few)
    wanted = transcription(scores[0].double().mean(0).tolist(), length, few, n_kept)
    assert chosen(press, table(scores, n_kept)) == [[wanted, wanted]]
    assert len(wanted) == n_kept


def test_by_hand():
    chunks = [[9, 1, 0, 0], [2] * 4, [1] * 4, [0.5, 0.25, 0.25, 0.5], [0, 0, 0, 0.4]]
    scores = torch.tensor(chunks).view(1, 1, 20)
    press = EntropyGatedChunkKVPress(Given(0.5, scores=scores), 4, 1)
    # The first chunk is the best one, and gives a single pair; the last is spiky, but not good.
    assert chosen(press, table(scores, 5)) == [[[0, 4, 5, 6, 7]]]
    assert chosen(press, table(scores, 9)) == [[[0, *range(4, 12)]]]
    # With room for more, the pairs that were cut come back, the best first.
    assert chosen(press, table(scores, 18)) == [[[0, 1, *range(4, 20)]]]
    whole = ChunkKVPress(Given(0.5, scores=scores), 4)
    assert chosen(whole, table(scores, 5)) == [[[0, 1, 2, 3, 7]]]


def test_one_lift_for_all_of_the_text_does_not_change_the_choice():
    """Scores that are all negative have no zero of their own."""
    scores = spiky(1, 1, 40, seed=4) - 1
    view = table(scores, 15)
    found = chosen(EntropyGatedChunkKVPress(Given(0.5, scores=scores), 5, 2), view)
    lower = chosen(EntropyGatedChunkKVPress(Given(0.5, scores=scores - 4), 5, 2), view)
    assert found == lower
    assert found != chosen(ChunkKVPress(Given(0.5, scores=scores), 5), view)


def test_chunks_of_equal_pairs_are_not_cut():
    scores = torch.zeros(1, 2, 12)
    press = EntropyGatedChunkKVPress(Given(0.5, scores=scores), 4, 1)
    assert chosen(press, table(scores, 6)) == [[[6, 7, 8, 9, 10, 11]] * 2]
    constant = torch.full((1, 2, 12), 0.7)
    press = EntropyGatedChunkKVPress(Given(0.5, scores=constant), 4, 1)
    assert chosen(press, table(constant, 6)) == [[[6, 7, 8, 9, 10, 11]] * 2]


def test_pinned_pairs_stay_first_and_change_no_entropy():
    scores = spiky(1, 2, 30, seed=5)
    press = EntropyGatedChunkKVPress(Given(0.5, scores=scores, sinks=2, window=3), 5, 2)
    means = scores[0].double().mean(0).tolist()
    wanted = transcription(means, 5, 2, 14, pinned=[0, 1, 29, 28, 27])
    assert chosen(press, table(scores, 14)) == [[wanted, wanted]]
    assert chosen(press, table(scores, 3)) == [[[0, 1, 29]] * 2]
    everything = EntropyGatedChunkKVPress(Given(0.5, scores=scores, window=30), 5, 2)
    assert chosen(everything, table(scores, 4)) == [[[26, 27, 28, 29]] * 2]


def test_each_sequence_has_its_own_medians_whatever_the_padding():
    scores, lengths, counts = spiky(3, 2, 33, seed=6), [33, 18, 1], [15, 9, 1]
    press = EntropyGatedChunkKVPress(Given(0.5, scores=scores), 5, 2)
    found = chosen(press, table(scores, counts, lengths))
    for b in range(3):
        means = scores[b].double().mean(0)[33 - lengths[b] :].tolist()
        assert found[b] == [transcription(means, 5, 2, counts[b])] * 2


def test_differs_from_whole_chunks_on_a_model_and_keeps_the_count():
    model, ids = tiny(), tokens(60)
    inner = cp.SnapKVPress(0.5, window_size=6)
    found = kept(pressed(model, EntropyGatedChunkKVPress(inner), ids))
    for layer in found:
        assert layer[0][0] == layer[0][1] and len(layer[0][0]) == 30
    assert found != kept(pressed(model, ChunkKVPress(inner, 10), ids))


@pytest.mark.parametrize("few", [0, 10, 11, 2.5])
def test_bad_options_are_refused(few):
    with pytest.raises(cp.CachepressError, match=f"low_entropy_chunk_length: got {few}, wanted"):
        EntropyGatedChunkKVPress(cp.KnormPress(0.5), low_entropy_chunk_length=few)
