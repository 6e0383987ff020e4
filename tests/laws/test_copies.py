"""Copies of a cache go on as the cache itself does: forked, joined, reordered, cropped, saved."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.cache.joined import form_of, join
from tests.bounds import close
from tests.tiny import exact_tiny, tokens
from tests.tiny_cache import forward, go_on, goes_on_as, kept

MODEL = exact_tiny()
KNORM = cp.KnormPress(0.5)
PRESSES = {
    "even": KNORM,
    "uneven": cp.AdaKVPress(KNORM),
    "in few bits": cp.KIVIPress(KNORM, residual=5),
    "uneven, in few bits": cp.KIVIPress(cp.AdaKVPress(KNORM), bits=4, residual=0),
    "by page": cp.QuestPress(cp.KnormPress(0.0), pages=1, skip_layers=0),
    "thin": cp.ComposedPress([cp.ThinKPress(0.5, window_size=6), KNORM]),
    "thin, by page": cp.QuestPress(cp.ThinKPress(0.5, window_size=6), pages=1, skip_layers=0),
    "turned": cp.KeyRerotationPress(cp.AdaKVPress(KNORM)),
}
by_press = pytest.mark.parametrize("press", PRESSES.values(), ids=list(PRESSES))


def read(press, seed=0, decoded=0):
    """A cache of a text and of some tokens that came since, the last one by itself."""
    cache = cp.prefill(MODEL, tokens(80, seed=seed), press)
    if decoded:
        forward(MODEL, cache, input_ids=tokens(decoded, seed=seed))
        forward(MODEL, cache, input_ids=tokens(1, seed=seed))
    return cache


@by_press
@pytest.mark.parametrize("decoded", [0, 3, 70])
def test_forks_go_on_apart_and_leave_the_cache_as_it_was(press, decoded):
    cache, ids = read(press, decoded=decoded), tokens(6, batch=3, seed=5)
    before, many = kept(cache), cp.fork(cache, 3)
    ours = go_on(MODEL, many, ids)
    assert kept(cache) == before
    alone = [cp.fork(cache) for _ in ids]
    wanted = [go_on(MODEL, one, text[None]) for one, text in zip(alone, ids, strict=True)]
    for step, logits in enumerate(ours):
        for row, own in zip(logits, wanted, strict=True):
            close(row, own[step][0])
    many.reorder_cache(torch.tensor([2, 0]))
    again = go_on(MODEL, many, tokens(2, batch=2, seed=8))
    for row, i in enumerate((2, 0)):
        own = go_on(MODEL, alone[i], tokens(2, batch=2, seed=8)[row : row + 1])
        for step in range(2):
            close(again[step][row], own[step][0])


@by_press
def test_a_cropped_cache_forgets_what_came_last(press):
    """Also what came in one go, and is hidden from queries before it."""
    cache, ids = read(press), tokens(30, seed=5)
    plain = cp.fork(cache)
    forward(MODEL, cache, input_ids=ids)
    cache = cp.fork(cache)
    cache.crop(-27)
    forward(MODEL, plain, input_ids=ids[:, :3])
    assert cache.get_seq_length() == plain.get_seq_length() == 83
    assert kept(cache) == kept(plain)
    for ours, wanted in zip(
        go_on(MODEL, cache, ids[:, 5:8]), go_on(MODEL, plain, ids[:, 5:8]), strict=True
    ):
        close(ours, wanted)


@by_press
def test_joined_caches_go_on_as_each_by_itself(press):
    caches = [read(press, seed) for seed in (1, 2)]
    assert len({form_of(cache) for cache in caches}) == 1
    ids, joined = tokens(5, batch=4, seed=3), join([caches], 2)
    for layer, *own in zip(kept(joined), *map(kept, caches), strict=True):
        assert layer == [own[i % 2][0] for i in range(4)]
    goes_on_as(MODEL, joined, caches * 2, ids)


def test_groups_of_uneven_heads_go_on_as_each_by_itself():
    groups = [[read(PRESSES["uneven"], 1)], [read(PRESSES["even"], seed) for seed in (2, 3)]]
    ids, joined = tokens(5, batch=6, seed=3), join(groups, 2)
    order = [groups[0][0]] * 2 + groups[1] * 2
    goes_on_as(MODEL, joined, order, ids)


@by_press
def test_a_saved_cache_goes_on_as_the_cache_does(press, tmp_path):
    cache = read(press, decoded=40)
    cp.save_cache(cache, tmp_path / "c", MODEL)
    loaded = cp.load_cache(tmp_path / "c", MODEL)
    assert kept(loaded) == kept(cache)
    for ours, wanted in zip(compressed_layers(loaded), compressed_layers(cache), strict=True):
        assert torch.equal(ours.keys, wanted.keys) and torch.equal(ours.values, wanted.values)
    ids = tokens(3, seed=5)
    for ours, wanted in zip(go_on(MODEL, loaded, ids), go_on(MODEL, cache, ids), strict=True):
        close(ours, wanted)


DECODING = {
    "queries": cp.SnapKVPress(window_size=6),
    "moments": cp.ExpectedAttentionPress(n_future_positions=32),
    "attention": cp.ObservedAttentionPress(),
}


@pytest.mark.parametrize("scorer", DECODING.values(), ids=list(DECODING))
def test_what_was_observed_of_decoded_tokens_stays_with_their_text(scorer):
    """Beams may change places, and a cache be copied, between two compressions."""
    press = cp.DecodingPress(scorer, 8, 20)
    texts, said = tokens(30, batch=2), tokens(8, batch=2, seed=1)

    def read(ids):
        cache = DynamicCache()
        forward(MODEL, cache, input_ids=ids)
        return cache

    with press(MODEL):
        alone = [read(text[None]) for text in texts]
        for cache, ids in zip(alone, said, strict=True):
            go_on(MODEL, cache, ids[None])
        both = read(texts)
        go_on(MODEL, both, said[:, :5])
        copied = cp.fork(both)
        go_on(MODEL, copied, said[:, 5:7].flip(0))
        both.reorder_cache(torch.tensor([1, 0]))
        go_on(MODEL, both, said[:, 5:].flip(0))
    assert compressed_layers(both)[0].lengths.tolist() == [[20, 20]] * 2
    assert compressed_layers(copied)[0].lengths.tolist() == [[27, 27]] * 2
    for layer, *own in zip(kept(both), *map(kept, alone), strict=True):
        assert layer == [own[1][0], own[0][0]]


def bare_keys(ids):
    """Keys before they are rotated, ``[B, H, T, 8]`` by layer."""
    found, hooks = [], []
    for layer in MODEL.model.layers:
        hook = layer.self_attn.k_proj.register_forward_hook(
            lambda module, given, out: found.append(out.unflatten(-1, (2, 8)).transpose(1, 2))
        )
        hooks.append(hook)
    forward(MODEL, input_ids=ids)
    for hook in hooks:
        hook.remove()
    return found


def turned(keys, positions):
    """Keys ``[H, n, 8]`` rotated to ``positions [n]``, by the model's own embedding."""
    cos, sin = MODEL.model.rotary_emb(keys, positions[None])
    return apply_rotary_pos_emb(keys[None], keys[None], cos, sin)[0][0]


@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize("padding", [0, 9])
def test_compacted_keys_stand_one_after_the_other_up_to_the_last_token(padding, start):
    """Wherever the text begins."""
    texts = tokens(40, batch=2)
    ids, mask, cache = texts.clone(), torch.ones(2, 40, dtype=torch.long), DynamicCache()
    mask[1, :padding] = 0
    place = (mask.cumsum(-1) - 1).clamp(min=0) + start
    given = {"attention_mask": mask} if padding else {}
    with PRESSES["turned"](MODEL):
        forward(MODEL, cache, input_ids=ids, position_ids=place, **given)
    for b, first in enumerate((0, padding)):
        text = texts[b : b + 1, first:]
        n = text.shape[1]
        for store, bare in zip(compressed_layers(cache), bare_keys(text), strict=True):
            for h in range(2):
                held = store.positions[b, h]
                rows = held[held >= 0].long() - first
                last = start + n
                wanted = turned(bare[0, h : h + 1, rows], torch.arange(last - len(rows), last))
                close(store.keys[b, h][held >= 0], wanted[0])


def test_merged_values_are_means_by_weight():
    """A pair that is like one that goes becomes the mean of the two, by what each weighs."""
    plain = cp.prefill(MODEL, tokens(40), cp.KnormPress(0.0))
    cache = cp.prefill(MODEL, tokens(40), cp.MergingPress(KNORM))
    store, whole = compressed_layers(cache)[0], compressed_layers(plain)[0]
    for h in range(2):
        keys, values = whole.keys[0, h], whole.values[0, h].clone()
        stays = store.positions[0, h].long()
        goes = [t for t in range(40) if t not in stays.tolist()]
        total, sums = torch.ones(40, dtype=torch.float64), values.clone()
        for t in goes:
            cosine = torch.cosine_similarity(keys[t][None], keys[stays], dim=-1)
            to = int(stays[cosine.argmax()])
            sizes = values[t].norm(), values[to].norm()
            weight = cosine.max().clamp(min=0) * sizes[0] / (sizes[0] + sizes[1])
            sums[to] += weight * values[t]
            total[to] += weight
        close(store.values[0, h], (sums / total[:, None])[stays])
