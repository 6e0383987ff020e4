"""CaM against the paper's algorithm, simulated on a whole cache, and its draws."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.presses.cam import _STREAM, CAMPress
from cachepress.presses.h2o import H2OPress
from tests.bounds import close
from tests.presses.test_merging import recording_merges
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward, kept


def draw(seed, layer, head, row):
    """The number from 0 to 1 that belongs to a pair."""
    view = SimpleNamespace(
        keys=torch.zeros(1, 2, 1, 1), layer=layer, index=torch.full((1, 2, 1), row)
    )
    return float(cp.RandomPress(seed=seed + _STREAM).score(view)[0, head, 0])


def merge(values, received, alive, lost, budget, drawn):
    """Share the values of the pairs that are lost among the next pairs that are left."""
    shared = {j: values[j].clone() for j in alive}
    for i in lost:
        window = [j for j in sorted(alive) if j > i][:budget]
        mean = sum(received[j] for j in window) / len(window) if window else 0.0
        if window and drawn[i] < min(1.0, received[i] / mean):
            for j in window:
                shared[j] = shared[j] + values[i] / len(window)
    return shared


class Simulation:
    """CaM on an uncompressed cache, with the keys of the smallest norm kept, pair after pair."""

    def __init__(self, size, budget, interval, seed):
        self.size, self.budget, self.interval, self.seed = size, budget, interval, seed
        self.values, self.sums, self.since = {}, {}, {}
        self.merged = 0

    def __call__(self, module, query, key, value, mask, scaling, **options):
        layer, (_, hq, n, _), (_, h, t, _) = module.layer_idx, query.shape, key.shape
        every = self.values.setdefault(layer, [{} for _ in range(h)])
        sums = self.sums.setdefault(layer, [{} for _ in range(h)])
        self.since[layer] = self.since.get(layer, 0) + n
        due = n > 1 or self.since[layer] >= self.interval
        out = value.new_zeros(1, n, hq, value.shape[-1])
        for j in range(h):
            values = every[j]
            values |= {r: value[0, j, r].clone() for r in range(t - n, t)}
            for q in range(n):
                rows = sorted(r for r in values if r <= t - n + q)
                for k in range(j * (hq // h), (j + 1) * (hq // h)):
                    weights = (key[0, j, rows] @ query[0, k, q] * scaling).softmax(-1)
                    out[0, q, k] = weights @ torch.stack([values[r] for r in rows])
                    for r, weight in zip(rows, weights.tolist(), strict=True):
                        sums[j][r] = sums[j].get(r, 0.0) + weight / (hq // h)
            if due and len(values) > self.size:
                self.evict(layer, j, values, sums[j], key[0, j].norm(dim=-1))
        self.since[layer] = 0 if due else self.since[layer]
        return out, None

    def evict(self, layer, j, values, sums, norms):
        lost = sorted(values, key=lambda r: norms[r])[self.size :]
        alive = sorted(set(values) - set(lost))
        drawn = {i: draw(self.seed, layer, j, i) for i in lost}
        shared = merge(values, sums, alive, sorted(lost), self.budget, drawn)
        self.merged += sum(bool((shared[r] != values[r]).any()) for r in alive)
        values.clear()
        values |= shared


@pytest.mark.parametrize(
    ("size", "budget", "interval", "seed"), [(12, 3, 1, 0), (7, 32, 1, 5), (9, 2, 4, 1)]
)
def test_decoding_is_the_algorithm_of_the_paper(size, budget, interval, seed):
    model, plain = tiny(), tiny()
    simulation = Simulation(size, budget, interval, seed)
    AttentionInterface.register("cam_by_hand", simulation)
    plain.set_attn_implementation("cam_by_hand")
    press = CAMPress(
        cp.KnormPress(),
        compression_interval=interval,
        target_size=size,
        merge_budget=budget,
        seed=seed,
    )
    cache, whole = DynamicCache(), DynamicCache()
    text = 3 + 89 * torch.arange(31) % 93  # No token twice: their keys would be as long.
    with press(model):
        for ids in (text[None, :20], *text[20:, None, None]):
            ours = forward(model, cache, input_ids=ids).logits
            wanted = forward(plain, whole, input_ids=ids).logits
            close(ours, wanted)
            for layer, store in enumerate(compressed_layers(cache)):
                rows = store.snapshot.rows()
                for j, positions in enumerate(rows.text_positions()[0].tolist()):
                    values = simulation.values[layer][j]
                    assert positions == sorted(values)
                    held = torch.stack([values[p] for p in positions])
                    close(rows.values[0, j], held)
    assert simulation.merged > 20


@pytest.mark.parametrize(
    "inner",
    [
        cp.AdaKVPress(cp.SnapKVPress(window_size=4), alpha_safeguard=0.0),
        cp.KnormPress(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("at_once", [40, 1 << 22])
def test_heads_share_among_pairs_of_their_own(inner, at_once, monkeypatch):
    """Whether all channels of the values are merged at once or few."""
    monkeypatch.setattr("cachepress.ops.blockwise.AT_ONCE", at_once)
    press, found = recording_merges(CAMPress(inner, 8, 9, merge_budget=4))
    cp.prefill(tiny(), tokens(40), press)
    for layer, (view, mask, (keys, values)) in enumerate(found):
        received = view.attention_sums.mean(2)
        assert keys is view.keys
        for h in range(2):
            alive = mask[0, h].nonzero()[:, 0].tolist()
            lost = (~mask[0, h]).nonzero()[:, 0].tolist()
            drawn = {i: draw(0, layer, h, i) for i in lost}
            wanted = merge(view.values[0, h], received[0, h].tolist(), alive, lost, 4, drawn)
            for j in alive:
                close(values[0, h, j], wanted[j])


LATER = tokens(93, seed=99)


def decoded(press, ids, mask=None, steps=13):
    """A cache after a prompt, and some more tokens of every sequence."""
    model, cache = tiny(), DynamicCache()
    b, n = ids.shape
    mask = torch.ones(b, n, dtype=torch.long) if mask is None else mask
    with press(model):
        for step in range(steps + 1):
            more = ids if not step else LATER[:, step : step + 1].expand(b, -1)
            mask = mask if not step else torch.cat([mask, mask.new_ones(b, 1)], dim=1)
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -more.shape[1] :]
            forward(model, cache, input_ids=more, attention_mask=mask, position_ids=places)
    return cache


@pytest.mark.parametrize("inner", [cp.AdaKVPress(cp.KnormPress()), cp.TOVAPress(), H2OPress()])
def test_a_sequence_of_a_padded_batch_draws_as_if_alone(inner):
    press = CAMPress(inner, 5, 9, merge_budget=3)
    texts = [tokens(n, seed=n) for n in (31, 18, 2)]
    ids = torch.zeros(3, 31, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[31 - text.shape[1] :] = text[0]
    batch = decoded(press, ids, (ids > 0).long())
    for b, text in enumerate(texts):
        for ours, wanted in zip(
            compressed_layers(batch), compressed_layers(decoded(press, text)), strict=True
        ):
            ours, wanted = ours.snapshot.rows(), wanted.snapshot.rows()
            for h in range(2):
                some, all_ = ours.text_positions()[b, h] >= 0, wanted.text_positions()[0, h] >= 0
                moved = ours.text_positions()[b, h][some] - (31 - text.shape[1])
                assert torch.equal(moved, wanted.text_positions()[0, h][all_])
                close(ours.values[b, h][some], wanted.values[0, h][all_])


def test_draws_repeat_and_belong_to_a_seed():
    once, again, other = (
        decoded(CAMPress(cp.KnormPress(), 4, 9, seed=seed), tokens(30)) for seed in (0, 0, 1)
    )
    assert kept(once)[0] == kept(other)[0]
    values = [
        torch.cat([store.values for store in compressed_layers(one)])
        for one in (once, again, other)
    ]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    inside = cp.RandomPress(seed=0)
    view = SimpleNamespace(
        keys=torch.zeros(1, 2, 9, 1), layer=0, index=torch.arange(9).expand(1, 2, 9)
    )
    draws = [draw(0, 0, 1, i) for i in range(9)]
    assert inside.score(view)[0, 1].tolist() != draws
    assert 0.0 <= min(draws) < max(draws) < 1.0


def test_the_attention_received_is_kept_unless_the_inner_press_keeps_a_token_state():
    press, found = recording_merges(CAMPress(cp.KnormPress(), 4, 9))
    cache = decoded(press, tokens(20), steps=4)
    view, mask, _ = found[4]
    row = int(mask[0, 0].nonzero()[0])
    received = view.token_state[0, 0, row] + view.attention_sums[0, 0, :, row].mean()
    close(compressed_layers(cache)[0].snapshot.rows().token_state[0, 0, 0], received)
    whole, found = recording_merges(CAMPress(H2OPress(), 4, 9))
    decoded(whole, tokens(20), steps=4)
    view = found[4][0]
    assert torch.equal(whole._received(view), view.attention_sums.mean(2))
    assert torch.equal(whole.token_state(view), H2OPress().token_state(view))


def test_the_last_pairs_have_none_to_be_merged_into():
    press, found = recording_merges(CAMPress(cp.StreamingLLMPress(), 4, 5, merge_budget=2))
    cp.prefill(tiny(), tokens(12), press)
    view, mask, _ = found[0]
    mask = torch.zeros_like(mask)
    mask[..., :3] = True
    _, values = press.merge(view, mask)
    assert torch.equal(values[mask], view.values[mask])
    assert press.merge(view, view.valid) is None
    _, values = press.merge(view, torch.zeros_like(mask))
    assert values.shape == view.values.shape


def test_the_spelling_and_bad_options():
    press = CAMPress(cp.KnormPress(), 4, 9, 2, 3, 7)
    assert cp.parse(repr(press)) == press == cp.parse("cam(knorm, 4, 9, 2, 3, 7)")
    assert CAMPress(cp.KnormPress()) == CAMPress(cp.KnormPress(), 512, 2048, 256, 32, 0)
    for bad in ({"merge_budget": 0}, {"seed": -1}, {"target_size": 0}):
        with pytest.raises(cp.CachepressError, match=f"{next(iter(bad))}: got"):
            CAMPress(cp.KnormPress(), **bad)
    with pytest.raises(cp.CachepressError, match="decides when pairs are evicted"):
        CAMPress(cp.DecodingPress(cp.KnormPress()))
