"""H2O against the paper's algorithm, simulated on a whole cache."""

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.presses.h2o import H2OPress
from tests.bounds import close
from tests.presses.test_snapkv import (
    assert_each_text_is_as_if_alone,
    assert_second_turns_are_as_if_alone,
    recording,
    two_turns,
)
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward, kept, pressed


class Simulation:
    """Attention on an uncompressed cache, with the pairs that H2O evicted masked by hand."""

    def __init__(self, size, recent):
        self.size, self.recent = size, recent
        self.alive, self.sums = {}, {}

    def __call__(self, module, query, key, value, mask, scaling, **options):
        layer, (_, hq, n, _), (_, h, t, _) = module.layer_idx, query.shape, key.shape
        alive = self.alive.setdefault(layer, [set() for _ in range(h)])
        sums = self.sums.setdefault(layer, [{} for _ in range(h)])
        out = value.new_zeros(1, n, hq, value.shape[-1])
        for j in range(h):
            alive[j] |= set(range(t - n, t))
            for q in range(n):
                rows = sorted(r for r in alive[j] if r <= t - n + q)
                for k in range(j * (hq // h), (j + 1) * (hq // h)):
                    weights = (key[0, j, rows] @ query[0, k, q] * scaling).softmax(-1)
                    out[0, q, k] = weights @ value[0, j, rows]
                    for r, weight in zip(rows, weights.tolist(), strict=True):
                        sums[j][r] = sums[j].get(r, 0.0) + weight
            self.evict(alive[j], sums[j])
        return out, None

    def evict(self, alive, sums):
        if len(alive) <= self.size:
            return
        rows = sorted(alive)
        newest = rows[len(rows) - self.recent :]
        others = sorted(rows[: len(rows) - self.recent], key=lambda r: sums[r], reverse=True)
        alive.intersection_update(newest + others[: self.size - self.recent])
        for r in set(sums) - alive:
            del sums[r]


@pytest.mark.parametrize(("size", "ratio", "recent"), [(12, 0.5, 6), (7, 0.3, 2), (5, 0.0, 0)])
def test_compression_at_each_token_is_the_algorithm_of_the_paper(size, ratio, recent):
    model, plain = tiny(), tiny()
    simulation = Simulation(size, recent)
    AttentionInterface.register("h2o_by_hand", simulation)
    plain.set_attn_implementation("h2o_by_hand")
    press = cp.DecodingPress(H2OPress(recent_ratio=ratio), compression_interval=1, target_size=size)
    cache, whole = DynamicCache(), DynamicCache()
    with press(model):
        for ids in (tokens(20), *tokens(12, seed=1).T[..., None]):
            ours = forward(model, cache, input_ids=ids).logits
            wanted = forward(plain, whole, input_ids=ids).logits
            close(ours, wanted)
            for layer, heads in enumerate(kept(cache)):
                assert heads[0] == [sorted(rows) for rows in simulation.alive[layer]]
    for layer, store in enumerate(compressed_layers(cache)):
        rows = store.snapshot.rows()
        for j, positions in enumerate(rows.text_positions()[0].tolist()):
            sums = [simulation.sums[layer][j][p] / 2 for p in positions]
            close(rows.token_state[0, j], torch.tensor(sums, dtype=torch.float64))


def test_sums_of_an_earlier_turn_stay_with_the_pairs_that_are_left():
    press, seen = recording(H2OPress(0.5))
    model, ids, cache = tiny(), tokens(34), DynamicCache()
    with press(model):
        forward(model, cache, input_ids=ids[:, :20])
        forward(model, cache, input_ids=ids[:, 20:])
    for (first, _), (second, score) in seen.values():
        assert second.keys.shape[2] == 24
        for j in range(2):
            for row, i in enumerate(second.index[0, j].tolist()):
                received = second.attention_sums[0, j, :, row].mean()
                if i < 20:
                    received = received + first.attention_sums[0, j, :, i].mean()
                close(press.token_state(second)[0, j, row], received)
                if i < 34 - 8:
                    assert score[0, j, row] == press.token_state(second)[0, j, row]
    assert all(rows[-8:] == list(range(26, 34)) for layer in kept(cache) for rows in layer[0])


def test_padding_and_short_texts_change_nothing():
    assert_each_text_is_as_if_alone(H2OPress(0.5))
    assert_each_text_is_as_if_alone(H2OPress(0.8, recent_ratio=0.25))


def test_turns_of_different_lengths_change_nothing():
    assert_second_turns_are_as_if_alone(H2OPress(0.5))


def test_token_states_belong_to_their_pairs_in_a_padded_batch():
    texts = [tokens(n, seed=n) for n in (31, 18)]
    later = [tokens(n, seed=n) for n in (3, 14)]
    batch, mask = two_turns(tiny(), H2OPress(0.5), texts, later)
    own = mask.cumsum(-1) - 1
    for i in range(2):
        alone, _ = two_turns(tiny(), H2OPress(0.5), texts[i : i + 1], later[i : i + 1])
        for ours, wanted in zip(compressed_layers(batch), compressed_layers(alone), strict=True):
            rows, wanted = ours.snapshot.rows(), wanted.snapshot.rows()
            for j in range(2):
                held = rows.positions[i, j] >= 0
                assert own[i][rows.positions[i, j][held].long()].tolist() == (
                    wanted.positions[0, j].tolist()
                )
                close(rows.token_state[i, j][held], wanted.token_state[0, j])


def test_online_chunks_add_up():
    online = cp.prefill(tiny(), tokens(40), H2OPress(0.5), chunk_size=10, mode="online")
    exact = cp.prefill(tiny(), tokens(40), H2OPress(0.5), chunk_size=10)
    once = cp.prefill(tiny(), tokens(40), H2OPress(0.5))
    assert kept(exact) == kept(once)
    for store in compressed_layers(online):
        assert store.lengths.tolist() == [[20, 20]]
        received = store.snapshot.rows().token_state
        assert received[..., 0].min() > received[..., -1].max()


def test_a_text_of_one_token_is_kept():
    assert kept(pressed(tiny(), H2OPress(0.5), tokens(1, batch=1)[:, :1])) == [[[[0], [0]]]] * 4
    assert kept(pressed(tiny(), H2OPress(0.9), tokens(2)))[0][0] == [[0], [0]]


def test_the_spelling_and_bad_options():
    press = H2OPress(0.5, 0.25)
    assert repr(press) == "H2OPress(compression_ratio=0.5, recent_ratio=0.25)"
    assert cp.parse(repr(press)) == press == cp.parse("h2o(0.5, 0.25)")
    for bad in (-0.1, 1.5, None, True):
        with pytest.raises(cp.CachepressError, match="recent_ratio: got"):
            H2OPress(0.5, bad)
    with pytest.raises(cp.CachepressError, match="use ChunkPress"):
        cp.BlockPress(H2OPress(0.5))
