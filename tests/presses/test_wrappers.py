"""What each wrapper changes, against plain transcriptions of its rule."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.hf.rotary import PairRotary
from tests.bounds import close, near
from tests.exact import doubled
from tests.laws.test_goldens import TERMS
from tests.tiny import exact_tiny as tiny
from tests.tiny import tiny as single
from tests.tiny import tokens
from tests.tiny_cache import allocated, forward, kept, pressed

SNAPKV = cp.SnapKVPress(0.5, window_size=6)
GOLDEN = Path(__file__).parents[1] / "golden"


def lengths(cache):
    return torch.stack([store.lengths for store in compressed_layers(cache)])  # [layers, B, H]


def test_adakv_gives_heads_their_own_numbers_and_a_floor():
    cache = pressed(tiny(), cp.AdaKVPress(SNAPKV), tokens(60))
    found = lengths(cache)
    assert torch.equal(found.sum(-1), torch.full((4, 1), 60))
    assert found.min() >= 6 and len(set(found.flatten().tolist())) > 2
    even = lengths(pressed(tiny(), cp.AdaKVPress(SNAPKV, alpha_safeguard=1.0), tokens(60)))
    assert set(even.flatten().tolist()) == {30}


def test_model_wide_competition_keeps_the_best_pairs_of_all_layers():
    model, ids = tiny(), tokens(60)
    scores = {}

    class Recording(cp.KnormPress):
        def score(self, view):
            scores[view.depth] = super().score(view)
            return scores[view.depth]

    press = cp.AdaKVPress(Recording(0.5), alpha_safeguard=0.0, scope="model")
    cache = pressed(model, press, ids)
    every = torch.stack([scores[i] for i in range(4)])  # [layers, 1, H, T]
    threshold = every.flatten().sort(descending=True).values[4 * 2 * 30 - 1]
    wanted = (every >= threshold).sum(-1)
    assert torch.equal(lengths(cache), wanted)
    assert len({int(n) for n in wanted.sum((1, 2))}) > 1


def test_criticalkv_weighs_with_the_projected_value():
    """A slow transcription of the two stages on one layer."""
    model, ids = tiny(), tokens(40)
    seen = {}

    class Recording(cp.SnapKVPress):
        def score(self, view):
            seen[view.depth] = (super().score(view), view)
            return seen[view.depth][0]

    inner = Recording(0.5, window_size=4)
    cache = pressed(model, cp.CriticalKVPress(inner, epsilon=1e-3, first_stage_ratio=0.25), ids)
    for depth, layer in enumerate(kept(cache)):
        scores, view = seen[depth]
        weight = model.model.layers[depth].self_attn.o_proj.weight.data  # [M, Hq * E]
        for h in range(2):
            order = scores[0, h].argsort(descending=True).tolist()
            first = order[:5]
            norms = []
            for t in range(40):
                value = view.values[0, h, t]
                heads = [weight[:, (2 * h + g) * 8 : (2 * h + g + 1) * 8] for g in range(2)]
                norms.append(sum((w @ value).abs().sum() for w in heads) / 2)
            window = [36, 37, 38, 39]
            rest = [t for t in range(40) if t not in {*first, *window}]
            rest.sort(key=lambda t: -float((scores[0, h, t] + 1e-3) * norms[t]))
            wanted = sorted({*first, *window, *rest[: 20 - len({*first, *window})]})
            assert layer[0][h] == wanted


def test_criticalkv_keeps_the_order_of_negative_scores():
    """Of two pairs with the same value, the one with the higher score stays, below zero too."""
    press = cp.CriticalKVPress(cp.KnormPress(0.5), first_stage_ratio=0.0)
    found = {}

    class Same(cp.WrapperPress):
        def score(self, view):
            same = view.values[:, :, :1].expand_as(view.values)
            from dataclasses import replace

            found["score"] = press.score(replace(view, values=same))
            return found["score"]

        @property
        def needs(self):
            return press.needs

    cache = pressed(tiny(), Same(cp.KnormPress(0.5)), tokens(30))
    assert kept(cache) == kept(pressed(tiny(), cp.KnormPress(0.5), tokens(30)))


@pytest.mark.parametrize("name", ["qwen3_next"])
def test_criticalkv_refuses_a_gated_output(name):
    with pytest.raises(cp.UnsupportedError, match="does not take what attention gave"):
        pressed(tiny(name), cp.CriticalKVPress(SNAPKV), tokens(30))


def test_criticalkv_reads_projections_of_other_classes_and_without_head_dim():
    assert not hasattr(tiny("gpt2").config, "head_dim")
    assert lengths(pressed(tiny("gpt2"), cp.CriticalKVPress(SNAPKV), tokens(30))).unique() == 15
    assert lengths(pressed(tiny("phi3"), cp.CriticalKVPress(SNAPKV), tokens(30))).unique() == 15


def test_pyramidkv_falls_linearly_and_keeps_the_total():
    press = cp.PyramidKVPress(0.5, window_size=6, beta=4)
    found = lengths(pressed(tiny(), press, tokens(61)))[:, 0, 0].tolist()
    assert sum(found) == 4 * 30
    assert found == sorted(found, reverse=True)
    assert found[-1] == 8 or found[-1] == 7
    narrow = lengths(pressed(tiny(), cp.PyramidKVPress(0.9, window_size=6), tokens(61)))
    assert set(narrow.flatten().tolist()) == {6}


def test_layers_have_their_own_ratios():
    press = cp.PerLayerCompressionPress(cp.KnormPress(), [0.0, 0.25, 0.5, 0.75])
    assert lengths(pressed(tiny(), press, tokens(40)))[:, 0, 0].tolist() == [40, 30, 20, 10]
    assert press.compression_ratio == 0.375
    with pytest.raises(cp.CachepressError, match="got 4 ratios, wanted 2"):
        press(tiny("gemma3"))


def test_key_rotation_agrees_with_the_reference_after_one_common_rotation():
    model = doubled(AutoModelForCausalLM.from_pretrained(GOLDEN / "llama_model"))
    ids = torch.from_numpy(np.load(GOLDEN / "ids.npy")).view(1, -1)
    golden = np.load(GOLDEN / "key_rerotation_knorm_0.5.npz")
    cache = pressed(model, cp.KeyRerotationPress(cp.KnormPress(0.5)), ids)
    rotary = PairRotary(lambda x, p: tuple(t[..., :4] for t in model.model.rotary_emb(x, p)), False)
    for layer, store in enumerate(compressed_layers(cache)):
        keys = torch.from_numpy(golden[f"keys_{layer}"]).double()
        shifted = rotary(keys, torch.full((1, keys.shape[2]), 256 - 128))
        near(store.keys, shifted, torch.float32, terms=TERMS, depth=4)
        assert store.snapshot.rows().rope[0, 0].tolist() == list(range(128, 256))


def test_rotated_keys_are_those_of_a_text_without_gaps():
    """A second turn rotates again, from where the first one left the keys."""
    model, ids = tiny(), tokens(40)
    press = cp.KeyRerotationPress(cp.StreamingLLMPress(0.5, n_sink=0))
    cache = pressed(model, press, ids[:, :20])
    with press(model):
        forward(model, cache, input_ids=ids[:, 20:])
    plain = pressed(model, cp.StreamingLLMPress(0.5, n_sink=0), ids[:, :20])
    with cp.StreamingLLMPress(0.5, n_sink=0)(model):
        forward(model, plain, input_ids=ids[:, 20:])
    # The newest pairs have no gaps, so rotating them changes nothing.
    for ours, wanted in zip(compressed_layers(cache), compressed_layers(plain), strict=True):
        close(ours.keys, wanted.keys)


def test_a_composition_chooses_among_what_is_left():
    model, ids = tiny(), tokens(40)
    press = cp.ComposedPress([cp.StreamingLLMPress(0.5, n_sink=0), cp.StreamingLLMPress(0.5)])
    assert kept(pressed(model, press, ids))[0][0][0] == list(range(30, 40))
    assert press.compression_ratio == 0.75
    with pytest.raises(cp.CachepressError, match="a ratio in each"):
        press.with_ratio(0.5)


def test_chunks_are_scored_and_kept_as_if_alone():
    model, ids = tiny(), tokens(40)
    press = cp.ChunkPress(cp.StreamingLLMPress(0.5, n_sink=2), chunk_length=10)
    wanted = [p for c in range(0, 40, 10) for p in (c, c + 1, c + 7, c + 8, c + 9)]
    assert kept(pressed(model, press, ids))[0][0][0] == wanted
    uneven = cp.ChunkPress(cp.KnormPress(0.3), chunk_length=7)
    assert lengths(pressed(model, uneven, ids)).unique() == 28


def test_a_chunk_is_judged_by_its_own_queries():
    model, ids = tiny(), tokens(44)
    texts, chunks = [], []

    class Recording(cp.SnapKVPress):
        def score(self, view):
            chunks.append(view)
            return super().score(view)

    class Whole(cp.ChunkPress):
        def score(self, view):
            texts.append(view)
            return super().score(view)

    pressed(model, Whole(Recording(0.5, window_size=6), chunk_length=12), ids)
    text, rows = texts[0], []
    for part in chunks[: len(chunks) // 4]:
        rows += [part.sequence(i) for i in range(len(part.keys))]
    assert [int(row.n_seen) for row in rows] == [12, 12, 12, 8]
    for c, row in enumerate(rows):
        own = slice(12 * c, min(12 * c + 12, 44))
        assert torch.equal(row.queries[0], text.queries[0, :, :, own][:, :, -6:])
        assert torch.equal(row.keys[0][:, -int(row.n_seen) :], text.keys[0, :, own])
        assert row.valid.sum(-1).tolist() == [[int(row.n_seen)] * 2]
        assert row.voters.all()


def test_blocks_never_bring_a_pair_back():
    """A slow transcription: a list of survivors, block by block."""
    model, ids = tiny(), tokens(40)
    cache = pressed(model, cp.BlockPress(cp.KnormPress(0.5), block_size=8), ids)
    assert kept(cache) == kept(pressed(model, cp.KnormPress(0.5), ids))
    whole = cp.prefill(model, ids)
    cache = pressed(model, cp.BlockPress(cp.KeyDiffPress(0.75), block_size=8), ids)
    keys = torch.nn.functional.normalize(whole.layers[0].keys[0, 0], dim=-1)
    left = []
    for start in range(0, 40, 8):
        left += range(start, start + 8)
        anchor = keys[left].mean(0)
        near = {t: float(torch.cosine_similarity(keys[t], anchor, dim=0)) for t in left}
        left = sorted(sorted(left, key=near.get)[:10])
    assert kept(cache)[0][0][0] == left


@pytest.mark.parametrize("wrap", [lambda p: p, cp.AdaKVPress], ids=["even", "AdaKV"])
@pytest.mark.parametrize("storage", ["full", cp.Codec(8, residual=8)], ids=["full", "int8"])
@pytest.mark.parametrize("limit", [60_000, 99_999, "150KB"])
def test_bytes_never_exceed_the_limit_and_come_close(wrap, storage, limit):
    press = wrap(cp.KnormPress(max_bytes=limit))
    cache = cp.prefill(single(), tokens(500), press, storage=storage)
    most = 150_000 if limit == "150KB" else limit
    held = allocated(compressed_layers(cache))
    assert held <= most
    assert held == cp.size_of(cache).bytes_after
    page = 4 * 2 * 32 * (2 * 8 * 4 + 4)
    assert held > most - (page if wrap is not cp.AdaKVPress else 2 * page) * (
        1 if storage == "full" else 2
    )


def test_too_few_bytes_are_refused_with_what_is_needed():
    with pytest.raises(cp.CachepressError, match="max_bytes: got 100, wanted at least 17408"):
        cp.prefill(single(), tokens(50), cp.KnormPress(max_bytes=100))


def test_a_number_of_pairs_is_exact():
    for wrap in (lambda p: p, cp.AdaKVPress):
        cache = cp.prefill(tiny(), tokens(50), wrap(cp.SnapKVPress(n_kept=17, window_size=6)))
        assert (lengths(cache).sum(-1) == 34).all()
    short = cp.prefill(tiny(), tokens(10), cp.KnormPress(n_kept=17))
    assert lengths(short).unique() == 10
