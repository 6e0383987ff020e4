"""KVCompose against the paper's algorithm on transformers' own attention weights."""

from itertools import product

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.presses.kvcompose import KVComposePress
from tests.bounds import close
from tests.presses.test_snapkv import (
    assert_each_text_is_as_if_alone,
    recording,
    two_turns,
)
from tests.tiny import exact_tiny as tiny
from tests.tiny import tiny as single
from tests.tiny import tokens
from tests.tiny_cache import forward, kept, pressed

NAMES = ("structured", "agg_task", "agg_group", "agg_head", "add_v_norm", "add_mean_across_heads")
CHOICES = [
    (True, "max", "mean", "mean", False, True),
    (True, "mean", "max", "max", True, False),
    (True, "max", "max", "mean", True, True),
    (False, "max", "mean", "mean", False, True),
    (False, "mean", "mean", "max", True, True),
]


def aggregated(numbers, how):
    return max(numbers) if how == "max" else sum(numbers) / len(numbers)


def worth_of(name, ids, press):
    """Worth of each pair by layer and KV head, from values and the weights of a second reading."""
    model, cache = tiny(name), DynamicCache()
    model.set_attn_implementation("eager")
    forward(model, cache, input_ids=ids)
    weights = forward(model, cache, input_ids=ids, output_attentions=True).attentions
    t, worth = ids.shape[1], []
    for layer, values in zip(weights, (x.values for x in cache.layers), strict=True):
        h = values.shape[1]
        g = layer.shape[1] // h
        rows = [[0.0] * t for _ in range(h)]
        for j, c in product(range(h), range(t)):
            each = [
                aggregated([float(layer[0, k, q, c]) for q in range(t)], press.agg_task)
                for k in range(j * g, (j + 1) * g)
            ]
            rows[j][c] = aggregated(each, press.agg_group)
            if press.add_v_norm:
                rows[j][c] *= float(values[0, j, c].norm())
        if press.add_mean_across_heads:
            means = [sum(head[c] for head in rows) / h for c in range(t)]
            rows = [[x + mean for x, mean in zip(head, means, strict=True)] for head in rows]
        worth.append(rows)
    return worth


def chosen_by_the_paper(worth, press, n_kept):
    """Positions by layer and head."""
    layers, heads, t = len(worth), len(worth[0]), len(worth[0][0])
    ranked = [[sorted(range(t), key=lambda c: head[c])[::-1] for head in rows] for rows in worth]
    least = press.keep_token_lower_bound
    if press.structured:
        composites = []
        for i, (rows, order) in enumerate(zip(worth, ranked, strict=True)):
            for rank in range(t):
                numbers = [rows[j][order[j][rank]] for j in range(heads)]
                value = aggregated(numbers, press.agg_head)
                composites.append((rank < max(1, least), value, i))
        best = sorted(composites)[::-1][: n_kept * layers]
        counts = [[sum(i == layer for *_, i in best)] * heads for layer in range(layers)]
    else:
        every = [
            (rank < least, worth[i][j][ranked[i][j][rank]], i, j)
            for i, j, rank in product(range(layers), range(heads), range(t))
        ]
        best = [(i, j) for *_, i, j in sorted(every)[::-1][: n_kept * layers * heads]]
        counts = [[best.count((i, j)) for j in range(heads)] for i in range(layers)]
    return [
        [sorted(order[: counts[i][j]]) for j, order in enumerate(rows)]
        for i, rows in enumerate(ranked)
    ]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("name", "least"), [("llama", 0), ("gpt2", 3)])
def test_keeps_what_the_paper_keeps(name, least, choice):
    press = KVComposePress(0.6, **dict(zip(NAMES, choice, strict=True)))
    press = KVComposePress(**{**vars(press), "keep_token_lower_bound": least})
    ids = tokens(25)
    wanted = chosen_by_the_paper(worth_of(name, ids, press), press, 10)
    found = [layer[0] for layer in kept(pressed(tiny(name), press, ids))]
    assert found == wanted
    counts = {len(head) for layer in found for head in layer}
    assert len(counts) > 1 and min(counts) >= max(least, press.structured)


def test_every_head_of_a_layer_keeps_the_same_number():
    cache = pressed(tiny(), KVComposePress(0.7), tokens(41, batch=2))
    lengths = torch.stack([store.lengths for store in compressed_layers(cache)])  # [layers, B, H]
    assert torch.equal(lengths[..., 0], lengths[..., 1])
    assert lengths.sum((0, 2)).tolist() == [4 * 2 * 12] * 2
    assert len(set(lengths[:, 0, 0].tolist())) > 1


def test_equal_composites_are_not_split():
    class Flat(KVComposePress):
        def _importance(self, view):
            return torch.ones_like(super()._importance(view))

    for ratio in (0.5, 0.35, 0.9):
        cache = pressed(tiny(), Flat(ratio), tokens(20))
        lengths = torch.stack([store.lengths[0] for store in compressed_layers(cache)])
        assert torch.equal(lengths[:, 0], lengths[:, 1])
        assert int(lengths.sum()) == 8 * round(20 * (1 - ratio))
    assert kept(cache) == [[[[18, 19]] * 2]] * 4


def test_ratio_0_equals_no_press():
    model, ids, cache, plain = tiny(), tokens(40), DynamicCache(), DynamicCache()
    with KVComposePress()(model):
        ours = forward(model, cache, input_ids=ids).logits
    assert torch.equal(ours, forward(model, plain, input_ids=ids).logits)
    assert [store.lengths.tolist() for store in compressed_layers(cache)] == [[[40, 40]]] * 4


@pytest.mark.parametrize("structured", [True, False])
def test_padding_and_short_texts_change_nothing(structured):
    assert_each_text_is_as_if_alone(KVComposePress(0.5, structured))
    assert_each_text_is_as_if_alone(
        KVComposePress(0.7, structured, "mean", add_v_norm=True, keep_token_lower_bound=2)
    )


def test_turns_of_different_lengths_change_nothing():
    model, press = tiny(), KVComposePress(0.5)
    first = [tokens(n, seed=n) for n in (31, 18)]
    second = [tokens(n, seed=n) for n in (3, 14)]
    batch, mask = two_turns(model, press, first, second)
    own = mask.cumsum(-1) - 1
    for i, n in enumerate((34, 32)):
        alone, _ = two_turns(model, press, first[i : i + 1], second[i : i + 1])
        lengths = torch.stack([store.lengths[i] for store in compressed_layers(batch)])
        assert int(lengths.sum()) == 4 * 2 * (n // 2)
        assert torch.equal(lengths[:, 0], lengths[:, 1])
        for layer, layer_alone in zip(kept(batch), kept(alone), strict=True):
            assert [own[i][head].tolist() for head in layer[i]] == layer_alone[0]


def test_the_mean_over_heads_is_that_of_the_same_token_in_a_later_turn():
    press, seen = recording(KVComposePress(0.5))
    model, ids, cache = tiny(), tokens(40), DynamicCache()
    with press(model):
        forward(model, cache, input_ids=ids[:, :25])
        forward(model, cache, input_ids=ids[:, 25:])
    apart = 0
    for (first, _), (view, _) in seen.values():
        alone = press.token_state(view)[0]
        for j in range(2):
            old = view.index[0, j] < 25
            close(alone[j, old], first.hidden_feature[0, j, view.index[0, j, old]])
        worth = press._importance(view)[0]
        for j in range(2):
            for t, token in enumerate(view.index[0, j].tolist()):
                same = [(view.index[0, k] == token).nonzero().flatten() for k in range(2)]
                each = [alone[k, i[0]] for k, i in enumerate(same) if len(i)]
                apart += len(each) == 1
                wanted = alone[j, t] + sum(each) / len(each)
                close(worth[j, t], wanted)
    assert apart > 0


@pytest.mark.parametrize("task", ["max", "mean"])
def test_the_second_reading_in_parts_is_that_in_one_go(task):
    """In a first turn and in one that follows, with heads that hold different pairs."""
    worth = []
    for size in (2048, 7):
        press, seen = recording(KVComposePress(0.5, agg_task=task, chunk_size=size))
        model, cache = tiny(), DynamicCache()
        with press(model):
            forward(model, cache, input_ids=tokens(33))
            forward(model, cache, input_ids=tokens(20, seed=1))
        worth.append([view.hidden_feature for views in seen.values() for view, _ in views])
    for whole, parts in zip(*worth, strict=True):
        close(whole, parts)
        assert whole.isfinite().any()


def test_the_second_reading_is_given_no_words_and_leaves_nothing_behind():
    model, calls = tiny(), []
    model.config.name_or_path = ""
    model.model.register_forward_hook(lambda *_: calls.append(1))
    cache = pressed(model, KVComposePress(0.5, chunk_size=16), tokens(40))
    assert len(calls) == 1 + 3
    assert cache.get_seq_length() == 40
    pressed(model, KVComposePress(), tokens(40))
    assert len(calls) == 1 + 3 + 1


def test_exact_chunks_equal_one_go():
    once = cp.prefill(tiny(), tokens(40), KVComposePress(0.5))
    assert kept(cp.prefill(tiny(), tokens(40), KVComposePress(0.5), chunk_size=13)) == kept(once)


def test_other_budgets_and_a_running_generation():
    limit = 60_000
    cache = pressed(single(), KVComposePress(max_bytes=limit), tokens(400))
    assert 0.6 * limit < cp.size_of(cache).bytes_after <= limit
    cache = pressed(single(), KVComposePress(n_kept=7), tokens(40))
    assert cp.size_of(cache).pairs_held == 4 * 2 * 7
    model, cache = single(), DynamicCache()
    around = cp.PrefillDecodingPress(KVComposePress(0.5), cp.DecodingPress(cp.KnormPress(), 4, 10))
    with around(model):
        forward(model, cache, input_ids=tokens(30))
        lengths = torch.stack([store.lengths[0] for store in compressed_layers(cache)])
        assert int(lengths.sum()) == 4 * 2 * 15 and torch.equal(lengths[:, 0], lengths[:, 1])
        for step in range(8):
            forward(model, cache, input_ids=tokens(1, seed=step))
    assert [store.lengths.tolist() for store in compressed_layers(cache)] == [[[10, 10]]] * 4
    for ratio in (0.0, 0.5):
        with pytest.raises(cp.CachepressError, match="use PrefillDecodingPress"):
            cp.DecodingPress(KVComposePress(ratio))


def test_bf16_is_scored_in_float32():
    press, seen = recording(KVComposePress(0.5, add_v_norm=True))
    pressed(tiny().bfloat16(), press, tokens(30))
    assert all(score.dtype == torch.float32 for [(_, score)] in seen.values())


def test_the_spelling_and_bad_options():
    press = KVComposePress(0.5, False, "mean")
    assert cp.parse(repr(press)) == press == cp.parse("kvcompose(0.5, False, 'mean')")
    assert press.with_ratio(0.25) == KVComposePress(0.25, False, "mean")
    for options, message in (
        ({"agg_task": "sum"}, 'agg_task: got \'sum\', wanted "max" or "mean"'),
        ({"agg_group": None}, "agg_group: got None, wanted"),
        ({"agg_head": 1}, "agg_head: got 1, wanted"),
        ({"chunk_size": 0}, "chunk_size: got 0, wanted a whole number"),
        ({"keep_token_lower_bound": -1}, "keep_token_lower_bound: got -1, wanted a whole number"),
    ):
        with pytest.raises(cp.CachepressError, match=message):
            KVComposePress(0.5, **options)
    with pytest.raises(cp.CachepressError, match="cannot wrap a budget of scope"):
        cp.CriticalKVPress(press)
