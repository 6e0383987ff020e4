"""DuoAttention: which heads stream, and what they keep."""

import json

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.presses._heads import far_scores
from cachepress.presses.composed import ComposedPress
from cachepress.presses.duo_attention import DuoAttentionPress
from tests.presses.test_snapkv import assert_each_text_is_as_if_alone, two_turns
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward, kept, pressed

PATTERN = ((0.9, 0.1), (0.5, 0.5), (0.05, 1.0), (0.3, 0.7))
ORDER = [(2, 0), (0, 1), (3, 0), (1, 0), (1, 1), (3, 1), (0, 0), (2, 1)]
SIZES = {"sink_size": 3, "recent_size": 6}


def assert_streams(cache, heads, n, sink, recent):
    for depth, layer in enumerate(kept(cache)):
        for h, rows in enumerate(layer[0]):
            streams = [*range(sink), *range(n - recent, n)]
            assert rows == (streams if (depth, h) in heads else list(range(n)))


@pytest.mark.parametrize(("ratio", "count"), [(0.124, 0), (0.125, 1), (0.5, 4), (0.99, 7), (1, 8)])
def test_the_heads_with_the_lowest_scores_stream(ratio, count):
    cache = pressed(tiny(), DuoAttentionPress(ratio, PATTERN, **SIZES), tokens(40))
    assert_streams(cache, ORDER[:count], 40, 3, 6)


def test_ratio_0_equals_no_press():
    model, ids, cache, plain = tiny(), tokens(40), DynamicCache(), DynamicCache()
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with DuoAttentionPress()(model):
        ours = forward(model, cache, input_ids=ids).logits
    assert len(calls) == 1
    assert torch.equal(ours, forward(model, plain, input_ids=ids).logits)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_without_a_pattern_scores_are_estimated(name):
    model = tiny(name)
    scores = far_scores(tiny(name), 3, 6)
    order = sorted((x, d, h) for d, row in enumerate(scores) for h, x in enumerate(row))
    for ratio in (0.25, 0.75):
        cache = pressed(model, DuoAttentionPress(ratio, **SIZES), tokens(40))
        count = int(len(order) * ratio)
        assert_streams(cache, {(d, h) for _, d, h in order[:count]}, 40, 3, 6)


def test_a_published_pattern_brings_its_sizes(tmp_path):
    model, ids = tiny(), tokens(40)
    file = tmp_path / "full_attention_heads.tsv"
    file.write_text("".join("\t".join(f"{x:.18e}" for x in row) + "\n" for row in PATTERN))
    ready = DuoAttentionPress(0.5, str(file)).for_model(model)
    assert ready == DuoAttentionPress(0.5, PATTERN, 128, 256)
    (tmp_path / "config.json").write_text(json.dumps({"sink_size": 2, "recent_size": 5, "lr": 1}))
    for path in (file, tmp_path):
        cache = pressed(model, DuoAttentionPress(0.5, str(path)), ids)
        assert_streams(cache, ORDER[:4], 40, 2, 5)
    mine = pressed(model, DuoAttentionPress(0.5, str(file), recent_size=9), ids)
    assert_streams(mine, ORDER[:4], 40, 2, 9)
    for text, message in (
        ("[1", "cannot be read"),
        ("[" * 100_000, "nested too deeply"),
        ('{"sink_size": "x"}', "wanted numbers"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(cp.CachepressError, match=f"pattern: .*config.json .*{message}"):
            DuoAttentionPress(0.5, str(file)).for_model(model)


@pytest.mark.parametrize("written", [False, True])
def test_trained_scores_that_ended_below_0_are_0(tmp_path, written):
    """Of heads that are 0 then, those of the first layers stream."""
    rows = ((0.0, -0.02), (0.5, 1.01), (-0.3, 0.2), (-1e-9, 0.4))
    pattern: object = rows
    if written:
        file = tmp_path / "full_attention_heads.tsv"
        file.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
        pattern = str(file)
    for ratio, heads in ((0.25, {(0, 0), (0, 1)}), (0.5, {(0, 0), (0, 1), (2, 0), (3, 0)})):
        cache = pressed(tiny(), DuoAttentionPress(ratio, pattern, **SIZES), tokens(40))
        assert_streams(cache, heads, 40, 3, 6)
    with pytest.raises(cp.CachepressError, match="pattern: wanted a number of at least -1"):
        DuoAttentionPress(0.5, ((0.5, -1.5),))


def test_a_wrong_pattern_is_refused_before_any_work(tmp_path):
    cache = DynamicCache()
    for pattern, message in (
        (str(tmp_path / "none.tsv"), "pattern: got .*none.tsv.*No such file"),
        (PATTERN[:3], "pattern: got scores of 3 layers of 2 KV heads, and LlamaForCausalLM has 4"),
        (((1.0,) * 4,) * 4, "pattern: got scores of 4 layers of 4 KV heads"),
    ):
        for press in (
            DuoAttentionPress(0.0, pattern),
            ComposedPress([cp.KnormPress(0.5), DuoAttentionPress(0.5, pattern)]),
        ):
            with pytest.raises(cp.CachepressError, match=message), press(tiny()):
                pass
            with pytest.raises(cp.CachepressError, match=message):
                cp.prefill(tiny(), tokens(10), press, cache=cache)
    assert cache.get_seq_length() == 0


def test_a_head_that_streams_holds_its_own_pairs_only():
    cache = pressed(tiny(), DuoAttentionPress(0.5, PATTERN, **SIZES), tokens(400))
    assert [store.lengths.tolist() for store in compressed_layers(cache)] == [
        [[400, 9]],
        [[9, 400]],
        [[9, 400]],
        [[9, 400]],
    ]
    # 13 pages of 32 slots and one page: two vectors of 8 numbers and a position in each.
    assert cp.size_of(cache).bytes_after < 4 * 14 * 32 * (8 * 8 * 2 + 4) * 1.1


def test_padding_changes_nothing():
    assert_each_text_is_as_if_alone(DuoAttentionPress(0.5, PATTERN, **SIZES))


def test_turns_of_different_lengths_change_nothing():
    model, press = tiny(), DuoAttentionPress(0.5, PATTERN, **SIZES)
    first = [tokens(n, seed=n) for n in (31, 8)]
    second = [tokens(n, seed=n) for n in (3, 14)]
    batch, mask = two_turns(model, press, first, second)
    own = mask.cumsum(-1) - 1
    for i, n in enumerate((34, 22)):
        for depth, layer in enumerate(kept(batch)):
            for h, rows in enumerate(layer[i]):
                streams = [0, 1, 2, *range(n - 6, n)]
                wanted = streams if (depth, h) in ORDER[:4] else list(range(n))
                assert own[i][rows].tolist() == wanted


def test_a_second_turn_moves_the_window():
    model, ids, cache = tiny(), tokens(40), DynamicCache()
    press = DuoAttentionPress(0.5, PATTERN, **SIZES)
    with press(model):
        forward(model, cache, input_ids=ids[:, :21])
        forward(model, cache, input_ids=ids[:, 21:])
    assert_streams(cache, ORDER[:4], 40, 3, 6)
    online = cp.prefill(model, ids, press, chunk_size=7, mode="online")
    assert_streams(online, ORDER[:4], 40, 3, 6)


def test_in_a_composition_streaming_heads_choose_among_what_is_left():
    first = cp.StreamingLLMPress(0.5)
    press = ComposedPress([first, DuoAttentionPress(0.5, PATTERN, **SIZES)])
    cache = pressed(tiny(), press, tokens(40))
    for depth, layer in enumerate(kept(cache)):
        for h, rows in enumerate(layer[0]):
            left = [*range(4), *range(24, 40)]
            streams = [p for p in left if p < 3 or p >= 34]
            assert rows == (streams if (depth, h) in ORDER[:4] else left)


def test_the_spelling_and_bad_options():
    press = DuoAttentionPress(0.5, [[0.5, 1], [0.25, 0]], 16)
    spelling = (
        "DuoAttentionPress(head_compression_ratio=0.5, pattern=((0.5, 1), (0.25, 0)), "
        "sink_size=16, recent_size=None)"
    )
    assert repr(press) == spelling
    assert cp.parse(spelling) == press == cp.parse("duo_attention(0.5, [[0.5, 1], [0.25, 0]], 16)")
    assert cp.parse("duo_attention(0.5, 'a/b.tsv')") == DuoAttentionPress(0.5, "a/b.tsv")
    assert press.with_ratio(0.25).head_compression_ratio == 0.25
    for options, message in (
        ({"head_compression_ratio": 1.5}, "head_compression_ratio: got 1.5, wanted a number from"),
        ({"sink_size": -1}, "sink_size: got -1, wanted a whole number of at least 0"),
        ({"recent_size": 0}, "recent_size: got 0, wanted a whole number of at least 1"),
        ({"pattern": ((0.5, "x"),)}, "pattern: wanted a number of at least -1"),
        ({"pattern": 3}, "pattern: wanted a number of at least -1"),
    ):
        with pytest.raises(cp.CachepressError, match=message):
            DuoAttentionPress(**options)
    with pytest.raises(cp.CachepressError, match="keeps as many as its own rule"):
        cp.AdaKVPress(press)
