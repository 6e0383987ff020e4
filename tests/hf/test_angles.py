"""A prompt in chunks is rotated as in one go, also where frequencies hang on its length."""

from threading import Event, Thread

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.hf.angles import RotaryModule, as_one_forward, rotary_modules
from cachepress.hf.shared_prefill import SharedPrefill
from tests.bounds import close
from tests.hf.rotated import LENGTHENS, LONG, SWITCH, UndoPress, bare_keys, error, long_model
from tests.tiny import tokens
from tests.tiny_cache import forward, kept


def state(model: PreTrainedModel) -> tuple[list[float], int]:
    """The frequencies of a model's rotary module now, and the longest text that it knows of."""
    module = model.model.rotary_emb
    return module.inv_freq.tolist(), int(module.max_seq_len_cached)


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("press", [None, cp.KnormPress(0.5), cp.ExpectedAttentionPress(0.5)])
@pytest.mark.parametrize("mode", ["exact", "online"])
def test_chunks_are_rotated_as_one_forward(kind, press, mode):
    ids, question = tokens(160), tokens(5, seed=1)
    once, chunked = long_model(kind), long_model(kind)
    whole = cp.prefill(once, ids, press)
    if mode == "online" and press is not None:
        press = type(press)(0.0)  # What chunks evict differs; what they rotate does not.
        whole = cp.prefill(once, ids, press)
    size = {"chunk_size": 40, "mode": mode}
    cache = cp.prefill(chunked, ids, press, **size)
    for ours, wanted in zip(cache.layers, whole.layers, strict=True):
        close(ours.keys, wanted.keys)
    close(
        forward(chunked, cache, input_ids=question).logits,
        forward(once, whole, input_ids=question).logits,
    )
    assert state(chunked) == state(once)


@pytest.mark.parametrize("kind", LENGTHENS)
def test_a_turn_in_chunks_is_rotated_as_a_turn_in_one_forward(kind):
    ids, more = tokens(50), tokens(60, seed=1)
    plain, chunked = long_model(kind), long_model(kind)
    wanted, cache = DynamicCache(), DynamicCache()
    forward(plain, wanted, input_ids=ids)
    forward(plain, wanted, input_ids=more)
    cp.prefill(chunked, ids, None, cache, chunk_size=20)
    cp.prefill(chunked, more, None, cache, chunk_size=20)
    close(cache.layers[1].keys, wanted.layers[1].keys)


@pytest.mark.parametrize("kind", LONG)
def test_a_shared_prefill_in_chunks_is_rotated_as_one_forward(kind):
    ids, presses = tokens(160), [cp.KnormPress(0.5), cp.ExpectedAttentionPress(0.5)]
    shared = SharedPrefill(long_model(kind), presses)
    shared.read(ids, chunk_size=40)
    for press in presses:
        cache, wanted = shared.compressed(press)[0], cp.prefill(long_model(kind), ids, press)
        assert kept(cache) == kept(wanted)
        for ours, theirs in zip(compressed_layers(cache), compressed_layers(wanted), strict=True):
            close(ours.keys, theirs.keys)


@pytest.mark.parametrize("kind", LONG)
def test_keys_of_every_chunk_are_undone_by_their_own_angles(kind):
    model, press = long_model(kind), UndoPress(0.5)
    bare = bare_keys(model)
    cp.prefill(model, tokens(160), press, chunk_size=40)
    assert error(press, bare) < 1e-9


def test_another_thread_is_not_shown_the_last_position_of_a_prompt():
    model, plain, ids = long_model("longrope"), long_model("longrope"), tokens(20)
    wanted, found = forward(plain, input_ids=ids).logits, []
    with as_one_forward(model.model, 39, 159):
        thread = Thread(target=lambda: found.append(forward(model, input_ids=ids).logits))
        thread.start()
        thread.join()
        ours = forward(model, input_ids=ids).logits
    assert torch.equal(found[0], wanted)
    assert not torch.allclose(ours, wanted)
    assert torch.equal(forward(model, input_ids=ids).logits, wanted)
    assert not model.model.rotary_emb._forward_hooks


@pytest.mark.parametrize("kind", ["yarn", "default"])
def test_modules_whose_frequencies_stay_are_not_hooked(kind):
    model = long_model(kind)
    with as_one_forward(model.model, 39, 159):
        assert not model.model.rotary_emb._forward_hooks


@pytest.mark.parametrize("kind", LENGTHENS)
def test_a_context_that_is_repeated_leaves_frequencies_as_they_were(kind):
    model, plain, ids = long_model(kind), long_model(kind), tokens(80)
    model.config.name_or_path = ""
    cache, wanted = DynamicCache(), DynamicCache()
    forward(plain, wanted, input_ids=ids)
    with cp.KVComposePress(0.5)(model):
        forward(model, cache, input_ids=ids)
    assert state(model)[1] == state(plain)[1]
    if kind == "dynamic":
        assert state(model) == state(plain)


@pytest.mark.parametrize("kind", LONG)
def test_angles_of_a_forward_stay_what_they_were(kind):
    module = long_model(kind).model.rotary_emb
    positions, later = torch.arange(90)[None], torch.arange(300)[None]
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    wanted = module(x, positions)
    angles = RotaryModule(module).at(positions.max())
    angles(x, later)
    module(x, later)
    for ours, theirs in zip(angles(x, positions[:, :50]), wanted, strict=True):
        assert torch.equal(ours, theirs[:, :50])


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize(("first", "last"), [(20, 40), (20, 160), (100, 160)])
def test_what_changes_with_length_is_told(kind, first, last):
    (found,) = rotary_modules(long_model(kind).model)
    crossed = first < SWITCH < last or (kind == "dynamic" and last > SWITCH)
    ends = (torch.tensor(first), torch.tensor(last))
    assert found.changes(*ends) == (crossed and kind in LENGTHENS)


@pytest.mark.parametrize("kind", LONG)
def test_generate_in_chunks_is_rotated_as_one_forward_under_a_press(kind):
    ids, caches = tokens(160), []
    for size in (None, 40):
        model = long_model(kind)
        options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
        with cp.ExpectedAttentionPress(0.5)(model):
            found = model.generate(ids, **options, prefill_chunk_size=size)
        caches.append(found.cache if hasattr(found, "cache") else found.past_key_values)
    for ours, wanted in zip(*(cache.layers for cache in caches), strict=True):
        close(ours.keys, wanted.keys)


def test_generate_in_chunks_outside_of_the_block_is_as_it_was():
    model, plain, ids = long_model("longrope"), long_model("longrope"), tokens(160)
    options = {"max_new_tokens": 1, "do_sample": False, "prefill_chunk_size": 40}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    entered, over = Event(), Event()

    def press():
        with cp.KnormPress(0.5)(model):
            entered.set()
            over.wait()

    thread = Thread(target=press)
    thread.start()
    entered.wait()
    ours = model.generate(ids, **options).logits[0]
    over.set()
    thread.join()
    assert torch.equal(ours, plain.generate(ids, **options).logits[0])
