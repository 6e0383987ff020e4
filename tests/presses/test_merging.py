"""Merging against a slow transcription of its rule, and where pairs have nowhere to go."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.ops import similarity
from cachepress.presses import merging
from cachepress.presses.merging import MergingPress
from tests.bounds import close, near
from tests.tiny import exact_tiny as tiny
from tests.tiny import randn, tokens
from tests.tiny_cache import forward, kept, pressed

GOLDEN = Path(__file__).parents[1] / "golden"
SNAPKV = cp.SnapKVPress(0.5, window_size=6)


def recording_merges(press):
    """The press, and what it was given and gave in each layer."""
    found = []

    class Recording(type(press)):
        def merge(self, view, mask):
            merged = super().merge(view, mask)
            found.append((view, mask, merged))
            return merged

    return Recording(**vars(press)), found


def by_hand(view, mask, threshold=0.0, fraction=1.0):
    """Values of the kept pairs after merging, pair after pair."""
    values = view.values.double()
    for b, h in np.ndindex(*mask.shape[:2]):
        kept_rows = mask[b, h].nonzero()[:, 0].tolist()
        lost_rows = (view.valid[b, h] & ~mask[b, h]).nonzero()[:, 0].tolist()
        alike = []
        for i in lost_rows:
            cosines = [
                float(torch.cosine_similarity(view.keys[b, h, i], view.keys[b, h, j], dim=0))
                for j in kept_rows
            ]
            if cosines and max(cosines) >= threshold:
                alike.append((max(cosines), i, kept_rows[cosines.index(max(cosines))]))
        alike = sorted(alike, reverse=True)[: int(fraction * len(lost_rows) + 1e-9)]
        for j in kept_rows:
            top, bottom = view.values[b, h, j].clone(), 1.0
            for cosine, i, target in alike:
                if target == j and cosine > 0:
                    own, other = view.values[b, h, i].norm(), view.values[b, h, j].norm()
                    weight = cosine * own / (own + other)
                    top, bottom = top + weight * view.values[b, h, i], bottom + weight
            values[b, h, j] = top / bottom
    return values


@pytest.mark.parametrize(("threshold", "fraction"), [(0.0, 1.0), (0.7, 1.0), (0.2, 0.3)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_values_are_those_of_the_rule(threshold, fraction, adaptive, monkeypatch):
    monkeypatch.setattr(merging, "_BLOCK", 5)
    monkeypatch.setattr(similarity, "_BLOCK", 5)
    inner = cp.AdaKVPress(SNAPKV, alpha_safeguard=0.0) if adaptive else SNAPKV
    press, found = recording_merges(MergingPress(inner, threshold, fraction))
    cache = pressed(tiny(), press, tokens(40))
    changed = 0
    for (view, mask, (keys, values)), store in zip(found, compressed_layers(cache), strict=True):
        wanted = by_hand(view, mask, threshold, fraction)
        close(values[mask], wanted[mask])
        assert keys is view.keys
        held = store.snapshot.rows()
        close(held.values[held.text_positions() >= 0], values[mask])
        changed += int((values[mask] != view.values[mask]).any(-1).sum())
    assert 0 < changed < 4 * 40
    assert kept(cache) == kept(pressed(tiny(), inner, tokens(40)))


@pytest.mark.parametrize(
    "press",
    [
        MergingPress(cp.AdaKVPress(SNAPKV)),
        cp.AdaKVPress(MergingPress(SNAPKV)),
        cp.AdaKVPress(MergingPress(cp.KnormPress(0.6)), scope="model"),
        cp.DecodingPress(MergingPress(cp.KnormPress()), 8, 9),
        MergingPress(cp.KeyRerotationPress(cp.KnormPress(0.5))),
    ],
    ids=repr,
)
def test_a_sequence_of_a_padded_batch_is_merged_as_if_alone(press):
    texts = [tokens(n, seed=n) for n in (37, 22, 3)]
    ids = torch.zeros(3, 37, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[37 - text.shape[1] :] = text[0]
    cache = cp.prefill(tiny(), ids, press, attention_mask=(ids > 0).long())
    for b, text in enumerate(texts):
        alone = cp.prefill(tiny(), text, press)
        for ours, wanted in zip(compressed_layers(cache), compressed_layers(alone), strict=True):
            ours, wanted = ours.snapshot.rows(), wanted.snapshot.rows()
            for h in range(2):
                some, all_ = ours.text_positions()[b, h] >= 0, wanted.text_positions()[0, h] >= 0
                for x, y in ((ours.keys, wanted.keys), (ours.values, wanted.values)):
                    close(x[b, h][some], y[0, h][all_])


def test_the_order_of_adakv_and_merging_makes_no_difference():
    inside = pressed(tiny(), MergingPress(cp.AdaKVPress(SNAPKV)), tokens(40))
    outside = pressed(tiny(), cp.AdaKVPress(MergingPress(SNAPKV)), tokens(40))
    for one, other in zip(compressed_layers(inside), compressed_layers(outside), strict=True):
        assert torch.equal(one.snapshot.rows().values, other.snapshot.rows().values)


def test_a_head_that_keeps_nothing_and_one_that_keeps_all():
    press, found = recording_merges(MergingPress(SNAPKV))
    pressed(tiny(), press, tokens(20))
    view, _, _ = found[0]
    mask = view.valid.clone()
    mask[0, 0] = False
    _, values = press.merge(view, mask)
    assert torch.equal(values[0, 1], view.values[0, 1])
    assert press.merge(view, view.valid) is None
    ids, mask = tokens(9), torch.ones(1, 9, dtype=torch.long)
    mask[0, :4] = 0  # Padding is evicted, and leaves nothing.
    padded = cp.prefill(tiny(), ids, MergingPress(cp.KnormPress(0.0)), attention_mask=mask)
    plain = cp.prefill(tiny(), ids[:, 4:], cp.KnormPress(0.0))
    for ours, wanted in zip(compressed_layers(padded), compressed_layers(plain), strict=True):
        close(ours.values, wanted.values)


def test_what_the_inner_press_merged_is_not_merged_again():
    press, found = recording_merges(MergingPress(SNAPKV))
    pressed(tiny(), press, tokens(30))
    view, mask, (_, once) = found[0]
    _, twice = MergingPress(MergingPress(SNAPKV)).merge(view, mask)
    assert torch.equal(once[mask], twice[mask])
    _, rest = MergingPress(MergingPress(SNAPKV, merge_fraction=0.4)).merge(view, mask)
    assert not torch.equal(once[mask], rest[mask])
    _, part = MergingPress(SNAPKV, merge_fraction=0.4).merge(view, mask)
    left = replace(view, values=part)
    assert torch.equal(rest, press.merge(left, mask)[1])


def test_memory_is_bounded_in_both_directions(monkeypatch):
    monkeypatch.setattr(similarity, "_BLOCK", 16)
    monkeypatch.setattr(similarity, "_NUMBERS", 100)
    rows, others = randn(300, 4), randn(400, 4)
    keys, some = torch.cat([rows, others])[None, None], torch.arange(700) < 300
    some = some.expand(1, 1, 700)

    class Sizes(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given = [x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)]
            for x in out if isinstance(out, tuple | list) else (out,):
                if x.untyped_storage().data_ptr() not in given:
                    Sizes.most = max(Sizes.most, x.numel())
            return out

    with Sizes():
        likeness, index = similarity.most_similar(keys, some, ~some)
    assert Sizes.most <= 400 * 4
    cosines = torch.cosine_similarity(rows[:, None], others[None], dim=-1)
    assert torch.equal(index[some], 300 + cosines.argmax(-1))
    close(likeness[some], cosines.amax(-1))


def test_half_types_are_computed_in_full():
    press, found = recording_merges(MergingPress(SNAPKV))
    pressed(tiny().bfloat16(), press, tokens(30))
    view, mask, (_, values) = found[0]
    assert values.dtype == torch.bfloat16
    wide = replace(view, keys=view.keys.float(), values=view.values.float())
    wanted = by_hand(wide, mask)[mask]
    near(values[mask], wanted, torch.bfloat16, terms=2)


def test_merged_values_stay_in_a_second_turn():
    press, model, ids = MergingPress(cp.StreamingLLMPress(0.5, n_sink=0)), tiny(), tokens(44)
    first = pressed(model, press, ids[:, :20])
    cache = DynamicCache()
    with press(model):
        forward(model, cache, input_ids=ids[:, :20])
        forward(model, cache, input_ids=ids[:, 20:26])
    assert kept(cache)[0][0][0] == list(range(13, 26))
    before, now = compressed_layers(first)[0].values, compressed_layers(cache)[0].values
    rows, found = recording_merges(press)
    with rows(model):
        forward(model, first, input_ids=ids[:, 20:26])
    assert torch.equal(found[0][0].values[:, :, :10], before)
    close(now, found[0][2][1][found[0][1]].view_as(now))


def test_the_spelling_and_bad_options():
    press = MergingPress(cp.KnormPress(0.5), 0.25, 0.75)
    assert cp.parse(repr(press)) == press == cp.parse("merging(knorm(0.5), 0.25, 0.75)")
    assert press.with_ratio(0.25).compression_ratio == 0.25
    for bad in ({"similarity_threshold": -0.1}, {"merge_fraction": 1.5}):
        with pytest.raises(cp.CachepressError, match=f"{next(iter(bad))}: got"):
            MergingPress(cp.KnormPress(0.5), **bad)
    with pytest.raises(cp.CachepressError, match="wraps a press"):
        MergingPress(0.5)
