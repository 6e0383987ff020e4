"""Recorded steps of models with sliding windows, which give what eager ones do, and leave it."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

import cachepress as cp
from cachepress.cache import window
from cachepress.hf import cache_argument, steps
from tests.bounds import close
from tests.hf.test_steps import PRESS, answered, both, stepped
from tests.tiny import exact_tiny, tokens
from tests.tiny_cache import forward, recorded_as

SLIDING = ["gemma2", "gemma3", "gpt_oss"]
SIZE = 16
OPTIONS = [
    {"copies": 3, "num_beams": 3},
    {"copies": 3, "num_beams": 3, "num_return_sequences": 2},
    {"copies": 2, "do_sample": True, "num_return_sequences": 2},
    {"repetition_penalty": 1.3},
]


def sliding(cache):
    return [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]


def same_windows(ours, wanted):
    """Assert that sliding layers hold the same, in the same shape, in a layer of transformers."""
    for one, other in zip(sliding(ours), sliding(wanted), strict=True):
        assert type(one) is DynamicSlidingWindowLayer and vars(one).keys() == vars(other).keys()
        assert one.get_seq_length() == other.get_seq_length()
        assert one.get_mask_sizes(1) == other.get_mask_sizes(1)
        close(one.keys, other.keys)
        close(one.values, other.values)


@pytest.mark.usefixtures("clear_answers")
@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_generate_with_every_way_of_choosing_tokens(name, options, replays):
    model, ids, found = exact_tiny(name), tokens(40), []
    for recorded in (False, True):
        torch.manual_seed(1)
        found.append(answered(model, ids, recorded, **options))
    assert torch.equal(*found)
    assert len(replays) > 5


@pytest.mark.parametrize(
    ("name", "n", "steps"),
    [("gemma2", 60, 20), ("gpt_oss", 60, 20), ("gemma3", 60, 140), ("gemma3", 3, 90)]
    + [("gemma3", n, 8) for n in (SIZE - 2, SIZE - 1, SIZE)],
)
def test_texts_of_every_length_and_answers_that_outgrow_the_buffer(name, n, steps, replays):
    model, held = exact_tiny(name), []
    for recorded in (False, True):
        cache = cp.prefill(model, tokens(n, batch=2), PRESS)
        held.append([stepped(model, cache, steps, recorded), cache])
    (wanted, eager), (ours, cache) = held
    close(ours, wanted)
    same_windows(cache, eager)
    # The first step makes the tail; three run as they are, and one is recorded.
    assert len(replays) == steps - 5
    close(stepped(model, cache, 3, False), stepped(model, eager, 3, False))


def padded(model, recorded, n=40):
    """Logits of further tokens of a batch that is padded on the left, and within its question."""
    mask = torch.ones(2, n, dtype=torch.long)
    mask[0, :9] = 0
    cache, logits = cp.prefill(model, tokens(n, batch=2), PRESS, attention_mask=mask), []
    with recorded_as(recorded):
        for i, x in enumerate([tokens(3, 2, seed=1), *tokens(20, 2, seed=3).split(1, dim=1)]):
            new = torch.ones(2, x.shape[1], dtype=torch.long)
            if i == 0:
                new[1, 1] = 0
            mask = torch.cat([mask, new], dim=1)
            at = (mask.cumsum(-1) - 1)[:, -x.shape[1] :]
            given = {"input_ids": x, "attention_mask": mask, "position_ids": at}
            logits.append(forward(model, cache, **given).logits)
    return torch.cat(logits[1:], dim=1)


@pytest.mark.parametrize("name", ["llama", *SLIDING])
@pytest.mark.parametrize("n", [12, 40])
def test_padding_in_a_window_is_hidden(name, n, replays):
    model = exact_tiny(name)
    close(padded(model, True, n), padded(model, False, n))
    assert len(replays) == 16


@pytest.mark.usefixtures("clear_answers")
@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("n", [8, 40])
def test_steps_after_prompt_lookup(name, n, replays):
    model, found = exact_tiny(name), []
    for recorded in (False, True):
        cache = cp.prefill(model, tokens(n), PRESS)
        lookup = {cache_argument(model): cache, "prompt_lookup_num_tokens": 2, "max_new_tokens": 12}
        with recorded_as(recorded):
            answer = model.generate(tokens(n + 3), do_sample=False, eos_token_id=None, **lookup)
        found.append([answer, stepped(model, cache, 8, recorded), cache])
    (wanted, logits, eager), (ours, our_logits, cache) = found
    assert torch.equal(ours, wanted)
    close(our_logits, logits)
    same_windows(cache, eager)
    assert replays


CHANGES = {
    "crop": lambda model, cache: cache.crop(-2),
    "reorder": lambda model, cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda model, cache: cache.batch_repeat_interleave(2),
    "select": lambda model, cache: cache.batch_select_indices(torch.tensor([1])),
    "a forward of several tokens": lambda model, cache: forward(
        model, cache, input_ids=tokens(5, batch=2, seed=9)
    ),
    "eager steps": lambda model, cache: stepped(model, cache, 3, False),
    "keeping the past": lambda model, cache: cache.activate_past_recording(),
    "nothing": lambda model, cache: None,
}


@pytest.mark.parametrize(
    ("name", "n"), [*((name, 40) for name in CHANGES if name != "crop"), ("crop", 4), ("repeat", 4)]
)
def test_a_cache_that_changes_between_steps(name, n, replays):
    # transformers' window cannot be cropped when tokens have left it.
    model, found = exact_tiny("gemma3"), []
    for recorded in (False, True):
        cache = cp.prefill(model, tokens(n, batch=2), PRESS)
        first = stepped(model, cache, 8, recorded)
        CHANGES[name](model, cache)
        found.append([first, stepped(model, cache, 8, recorded), cache])
    close(found[1][0], found[0][0])
    close(found[1][1], found[0][1])
    same_windows(found[1][2], found[0][2])
    assert len(replays) > 5


@pytest.mark.parametrize("n", [4, 40])
def test_a_window_that_keeps_the_past_can_be_cropped(n, replays):
    model, found = exact_tiny("gemma3"), []
    for recorded in (False, True):
        cache = cp.prefill(model, tokens(n, batch=2), PRESS)
        stepped(model, cache, 5, recorded)
        cache.activate_past_recording()
        first = stepped(model, cache, 70, recorded)
        cache.crop(-60)
        found.append([first, stepped(model, cache, 20, recorded), cache])
    close(found[1][0], found[0][0])
    close(found[1][1], found[0][1])
    same_windows(found[1][2], found[0][2])
    assert len(replays) > 80


COPIES = {
    "fork": lambda model, cache, tmp_path: cp.fork(cache),
    "deepcopy": lambda model, cache, tmp_path: copy.deepcopy(cache),
    "pickle": lambda model, cache, tmp_path: pickled(cache),
    "file": lambda model, cache, tmp_path: saved(model, cache, tmp_path / "cache.safetensors"),
    "shallow": lambda model, cache, tmp_path: shallow(cache),
}


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


def saved(model, cache, path):
    cp.save_cache(cache, path, model)
    return cp.load_cache(path, model)


def shallow(cache):
    """A fork whose sliding layers share their tensors with the cache."""
    copied = cp.fork(cache)
    copied.layers = [
        copy.copy(own) if isinstance(own, DynamicSlidingWindowLayer) else other
        for own, other in zip(cache.layers, copied.layers, strict=True)
    ]
    return copied


@pytest.mark.parametrize("name", COPIES)
def test_copies_in_the_middle_go_on_by_themselves(name, replays, tmp_path):
    model = exact_tiny("gemma3")
    cache = cp.prefill(model, tokens(40), PRESS)
    stepped(model, cache, 8)
    other = COPIES[name](model, cache, tmp_path)
    same_windows(other, cache)
    wanted = stepped(model, copy.deepcopy(cache), 6, False)
    found = [[], []]
    for x in tokens(6, seed=3).split(1, dim=1):
        for logits, held in zip(found, (cache, other), strict=True):
            logits.append(forward(model, held, input_ids=x).logits)
    for logits in found:
        close(torch.cat(logits, dim=1), wanted)
    assert len(replays) > 10


def test_one_recording_serves_windows_of_every_length_in_turns(replays):
    model = exact_tiny("gpt_oss")
    caches = [cp.prefill(model, tokens(n, seed=n), PRESS) for n in (30, 31, 45)]
    wanted = [stepped(model, cp.fork(cache), 25, False) for cache in caches]
    found = [[] for _ in caches]
    for x in tokens(25, seed=3).split(1, dim=1):
        for logits, cache in zip(found, caches, strict=True):
            logits.append(forward(model, cache, input_ids=x).logits)
    for logits, own in zip(found, wanted, strict=True):
        close(torch.cat(logits, dim=1), own)
    # The first step of each makes its tail; three run as they are, and one is recorded.
    assert len(replays) == 3 * 24 - 4


def test_a_window_holds_no_more_than_its_buffer_and_nothing_when_it_left(replays):
    model = exact_tiny("gemma3")
    cache = cp.prefill(model, tokens(40), PRESS)
    stepped(model, cache, 8)
    layer = sliding(cache)[0]
    assert layer.keys.untyped_storage().nbytes() == 2 * (SIZE - 1 + 64) * 8 * 8
    buffer = weakref.ref(window._WINDOWS[layer.keys]._buffer)
    forward(model, cache, input_ids=tokens(2))
    assert buffer() is None
    close(*both(model, cache))
    stepped(model, cache, 2)
    buffer = weakref.ref(window._WINDOWS[layer.keys]._buffer)
    del cache, layer
    gc.collect()
    assert buffer() is None


def test_chunks_are_not_taken_for_windows(replays, monkeypatch):
    """transformers keeps both in the same kind of layer."""
    model = exact_tiny("gemma3")
    cache = cp.prefill(model, tokens(40), PRESS)
    assert steps._windows(model.model) == {0, 2}
    kinds = model.config.layer_types
    with monkeypatch.context() as changed:
        changed.setattr(model.config, "layer_types", ["chunked_attention", *kinds[1:]])
        assert steps._windows(model.model) == {2}
    assert steps._STEPS[model].windows == {0, 2}
    steps._STEPS[model].windows = frozenset({2})
    close(*both(model, cache))
    assert replays == []
