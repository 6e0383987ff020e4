"""Bytes are what they are called: before, after, and the most that is allowed."""

import re
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers, ordinary
from cachepress.press import BasePress
from tests.laws.presses import every_scorer, name_of
from tests.tiny import tiny, tokens
from tests.tiny_cache import allocated, forward

LAYERS, HEADS, ROW = 4, 2, 2 * 8
SCORERS = [*every_scorer(0.0), cp.PyramidKVPress(window_size=4), cp.KVComposePress()]
STORAGES = ("full", "int8", "int4", "int2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)
EACH = [
    pytest.param(press, storage, dtype, batch, id=f"{name_of(press)}-{storage}")
    for press, storage, dtype, batch in zip(
        SCORERS * 2, cycle(STORAGES), cycle(DTYPES), cycle([1, 2, 3]), strict=False
    )
]
WRAPPERS = {
    "none": lambda press: press,
    "layer": cp.AdaKVPress,
    "model": lambda press: cp.AdaKVPress(press, scope="model"),
    "rotated": cp.KeyRerotationPress,
}


def model_of(dtype: torch.dtype):
    model = tiny().to(dtype)
    # Where ATEN_CPU_CAPABILITY forbids instructions that the processor has, torch's fused attention
    # in bfloat16 uses them all the same, and fails from 64 queries on.
    if dtype == torch.bfloat16:
        model.set_attn_implementation("eager")
    return model


def before(batch: int, n: int, dtype: torch.dtype) -> int:
    return LAYERS * HEADS * batch * n * ROW * dtype.itemsize


def least_of(run) -> int:
    """The least number of bytes that a refusal names."""
    with pytest.raises(cp.CachepressError, match="at least") as refused:
        run(1)
    found = re.search(r"at least (\d+)", str(refused.value))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(("press", "storage", "dtype", "batch"), EACH)
def test_before_is_an_uncompressed_cache_and_after_what_is_allocated(press, storage, dtype, batch):
    n = 75
    cache = cp.prefill(
        model_of(dtype), tokens(n, batch), press.with_ratio(0.5), storage=storage, question=3
    )
    size = cp.size_of(cache)
    assert size.bytes_before == before(batch, n, dtype)
    assert size.bytes_after == allocated(compressed_layers(cache))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("chunk", [None, 16])
def test_where_nothing_is_evicted_after_is_before(chunk, dtype):
    model = model_of(dtype)
    cache = cp.prefill(model, tokens(75, 2), cp.KnormPress(0.0), chunk_size=chunk)
    size = cp.size_of(cache)
    assert size.bytes_after == size.bytes_before == before(2, 75, dtype)
    plain = DynamicCache()
    forward(model, plain, input_ids=tokens(75, 2))
    assert cp.size_of(plain) == size
    assert cp.size_of(ordinary(cache)) == size


@pytest.mark.parametrize("n", [1, 75])
def test_presses_whose_layers_compete_keep_what_they_do_not_evict_as_it_was(n):
    scores = cp.KnormPress(0.0)
    for press in (
        cp.AdaKVPress(scores, scope="model"),
        cp.MergingPress(cp.AdaKVPress(scores, scope="model")),
        cp.HeadKVPress(scores, ((0.1, 0.9), (0.5, 0.2), (0.0, 0.3), (0.8, 0.4))),
        cp.KVzipPress(0.0),
        cp.KVComposePress(0.0),
        cp.AdaKVPress(cp.KnormPress(n_kept=200), scope="model"),
    ):
        cache = cp.prefill(tiny(), tokens(n, 2), press)
        size = cp.size_of(cache)
        assert size.bytes_after == size.bytes_before == before(2, n, torch.float32)
        plain = cp.prefill(tiny(), tokens(n, 2))
        for ours, wanted in zip(cache.layers, plain.layers, strict=True):
            assert torch.equal(ours.keys, wanted.keys) and torch.equal(ours.values, wanted.values)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("chunk", [None, 20])
def test_a_sliding_window_holds_its_own_tokens_only(name, chunk):
    """And not the prompt that transformers leaves it a view of."""
    model, full, window = tiny(name), 2 * HEADS * 75 * ROW * 4, 2 * HEADS * 15 * ROW * 4
    plain = DynamicCache(config=model.config)
    forward(model, plain, input_ids=tokens(75))
    for press in (None, cp.KnormPress(0.0), cp.KnormPress(0.5)):
        cache = cp.prefill(model, tokens(75), press, chunk_size=chunk)
        size = cp.size_of(cache)
        assert size.bytes_before == full + window
        kept = 2 * HEADS * 64 * (ROW * 4 + 4) if press == cp.KnormPress(0.5) else full
        assert size.bytes_after == kept + window
        if chunk is None:
            assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)
            assert torch.equal(cache.layers[0].values, plain.layers[0].values)
        again = forward(model, cp.fork(cache), input_ids=tokens(3)).logits
        assert torch.equal(forward(model, cache, input_ids=tokens(3)).logits, again)


def test_what_forks_share_is_stored_as_it_came_once_it_is_compressed_to_everything():
    model, press = tiny(), cp.KnormPress(n_kept=500)
    cache = cp.prefill(model, tokens(75), press)
    forked = cp.fork(cache)
    assert cp.size_of(forked).bytes_after > cp.size_of(forked).bytes_before
    with press(model):
        forward(model, forked, input_ids=tokens(5))
    size = cp.size_of(forked)
    assert size.bytes_after == size.bytes_before == before(1, 80, torch.float32)


@pytest.mark.parametrize("wrapper", list(WRAPPERS))
@pytest.mark.parametrize(("press", "storage", "dtype", "batch"), EACH[::3])
def test_max_bytes_holds_from_the_least_on(press, storage, dtype, batch, wrapper):
    if press.needs.compaction and wrapper == "rotated":
        pytest.skip("it rotates keys itself")
    model, ids = model_of(dtype), tokens(150, batch)

    def run(limit: int) -> int:
        bounded = WRAPPERS[wrapper](replace(press, max_bytes=limit))
        cache = cp.prefill(model, ids, bounded, storage=storage, question=3)
        assert cp.size_of(cache).bytes_before == before(batch, 150, dtype)
        return cp.size_of(cache).bytes_after

    least = least_of(run)
    for limit in (least, least + 7_777, 3 * least):
        assert run(limit) <= limit
    with pytest.raises(cp.CachepressError, match=f"at least {least} "):
        run(least - 1)


@pytest.mark.parametrize("limit", [34_816, 42_989, 70_000, 120_000])
@pytest.mark.parametrize("n", [70, 217, 295])
def test_a_pyramid_stays_below_max_bytes_and_uses_most_of_it(n, limit):
    press = cp.PyramidKVPress(window_size=4, max_bytes=limit)
    cache = cp.prefill(tiny(), tokens(n), press)
    used = cp.size_of(cache).bytes_after
    assert used <= limit
    page = LAYERS * HEADS * 32 * (ROW * 4 + 4)
    # A layer that keeps all of its text has no positions and no free slots.
    assert used > min(limit, before(1, n, torch.float32)) - 1.5 * page
    rows = [int(store.lengths.sum()) for store in compressed_layers(cache)]
    assert rows == sorted(rows, reverse=True)


def test_padding_counts_for_max_bytes():
    ids = tokens(200, 3)
    mask = torch.ones_like(ids)
    mask[1, :150], mask[2, :90] = 0, 0
    for press in (cp.KnormPress, lambda **how: cp.AdaKVPress(cp.KnormPress(**how))):

        def run(limit: int, press=press) -> int:
            cache = cp.prefill(tiny(), ids, press(max_bytes=limit), attention_mask=mask)
            return cp.size_of(cache).bytes_after

        least = least_of(run)
        for limit in (least, 2 * least, 3 * least):
            assert run(limit) <= limit


DECODED = {
    "head": lambda limit: cp.KnormPress(max_bytes=limit),
    "layer": lambda limit: cp.AdaKVPress(cp.KnormPress(max_bytes=limit)),
    "pyramid": lambda limit: cp.PyramidKVPress(window_size=4, max_bytes=limit),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", list(DECODED))
@pytest.mark.parametrize("interval", [5, 70])
def test_max_bytes_holds_at_every_token_of_a_generation(kind, storage, interval):
    model, ids = tiny(), tokens(90)

    def press_of(limit: int) -> BasePress:
        return cp.DecodingPress(DECODED[kind](limit), interval, target_size=10_000)

    limit = least_of(lambda n: cp.prefill(model, ids, press_of(n), storage=storage)) + 2_000
    press = press_of(limit)
    cache = cp.prefill(model, ids, press, storage=storage)
    steps = 2 * interval + 3
    with press(model, turns="first", storage=storage):
        for step in range(steps):
            size = cp.size_of(cache)
            assert size.bytes_after <= limit
            assert size.bytes_before == before(1, 90 + step, torch.float32)
            forward(model, cache, input_ids=tokens(1, seed=step))
    if storage == "full":
        assert cp.size_of(cache).pairs_held < LAYERS * HEADS * (90 + steps)


def test_the_smaller_of_target_size_and_max_bytes_is_kept():
    press = cp.DecodingPress(cp.KnormPress(max_bytes="1MB"), 8, target_size=20)
    cache = cp.prefill(tiny(), tokens(90), press)
    assert all(bool((store.lengths == 20).all()) for store in compressed_layers(cache))


def questioned(press: BasePress, storage: str, dtype: torch.dtype, batch: int, lengths) -> list:
    """Bytes after a prompt, and after every forward of questions and the tokens of their answers.

    Questions are left alone, and the later sequences of a batch begin with padding.
    """
    model, ids = model_of(dtype), tokens(150, batch)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 30 * row] = 0
    mask = mask if batch > 1 else None
    cache = cp.prefill(model, ids, press, storage=storage, attention_mask=mask)
    sizes = [cp.size_of(cache).bytes_after]
    with press(model, turns="first", storage=storage):
        for step, n in enumerate(lengths):
            if mask is not None:
                mask = torch.cat([mask, torch.ones(batch, n, dtype=torch.long)], dim=1)
            new = tokens(n, batch, seed=step)
            forward(model, cache, input_ids=new, attention_mask=mask)
            sizes.append(cp.size_of(cache).bytes_after)
    return sizes


GROWING = {
    "head": lambda n, i: cp.DecodingPress(cp.KnormPress(max_bytes=n), i, 10**4),
    "layer": lambda n, i: cp.DecodingPress(cp.AdaKVPress(cp.KnormPress(max_bytes=n)), i, 10**4),
    "model": lambda n, i: cp.DecodingPress(
        cp.AdaKVPress(cp.KnormPress(max_bytes=n), scope="model"), i, 10**4
    ),
    "ratio": lambda n, i: cp.CompressionRatioDecodingPress(cp.KnormPress(max_bytes=n), i, 0.1),
    "left_with_rows": lambda n, i: cp.CAMPress(cp.KnormPress(max_bytes=n), i, 10**4),
    "prompt_left_whole": lambda n, i: cp.PrefillDecodingPress(
        None, cp.DecodingPress(cp.KnormPress(max_bytes=n), i, 10)
    ),
    "prompt_by_ratio": lambda n, i: cp.PrefillDecodingPress(
        cp.AdaKVPress(cp.TOVAPress(0.1)), cp.DecodingPress(cp.KnormPress(max_bytes=n), i, 10)
    ),
    "prompt_by_pyramid": lambda n, i: cp.PrefillDecodingPress(
        cp.PyramidKVPress(0.1, window_size=4), cp.DecodingPress(cp.KnormPress(max_bytes=n), i, 10)
    ),
    "prompt_by_bytes": lambda n, i: cp.PrefillDecodingPress(
        cp.AdaKVPress(cp.KnormPress(max_bytes=10**7)),
        cp.DecodingPress(cp.KnormPress(max_bytes=n), i, 10),
    ),
}
QUESTIONS = [9, *[1] * 5, 41, 1, 130, *[1] * 9, 3, 3, 3, *[1] * 9]


@pytest.mark.parametrize(
    ("kind", "storage", "dtype", "interval", "batch"),
    [
        pytest.param(*case, batch, id=f"{case[0]}-{case[1]}-{case[3]}-{batch}")
        for batch in (1, 3)
        for case in zip(
            GROWING, cycle(STORAGES[batch:] + STORAGES), cycle(DTYPES), cycle([4, 33, 100])
        )
    ],
)
def test_max_bytes_of_a_press_for_decoding_bounds_prompts_questions_and_answers(
    kind, storage, dtype, interval, batch
):
    def run(limit: int) -> list:
        return questioned(GROWING[kind](limit, interval), storage, dtype, batch, QUESTIONS)

    limit = least_of(run) + 2_000 * batch
    assert max(run(limit)) <= limit


def test_a_prompt_that_fits_is_left_whole_until_its_interval():
    press = cp.DecodingPress(cp.KnormPress(max_bytes="1MB"), 8, target_size=20)
    cache = cp.prefill(tiny(), tokens(90), cp.PrefillDecodingPress(None, press))
    assert [store.lengths.tolist() for store in compressed_layers(cache)] == [[[90, 90]]] * LAYERS
    with pytest.raises(cp.CachepressError, match="beside max_bytes in decoding_press"):
        cp.PrefillDecodingPress(cp.DMSPress(cp.KnormPress(), threshold=0.0), press)


def test_questions_count_only_where_bytes_are_bounded():
    model, held = tiny(), []
    for options in ({"max_bytes": "1MB"}, {}):
        press = cp.DecodingPress(cp.KnormPress(**options), 8, target_size=20)
        cache = cp.prefill(model, tokens(90), press)
        with press(model, turns="first"):
            for n in (5, 1, 1, 1):
                forward(model, cache, input_ids=tokens(n))
        held.append(int(compressed_layers(cache)[0].lengths[0, 0]))
    assert held == [20, 28]
