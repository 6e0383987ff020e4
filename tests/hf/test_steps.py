"""Decoded steps that are recorded and replayed, on a CPU: the same code, without a graph."""

import gc
import logging
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.cache.joined import join
from cachepress.hf import cache_argument, steps
from tests.bounds import close
from tests.counting import CountingPress
from tests.tiny import ARCHITECTURES, exact_tiny, tokens
from tests.tiny_cache import forward, recorded_as

PRESS = cp.AdaKVPress(cp.KnormPress(0.5))
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}
RECURRENT = {"qwen3_next"}


def answered(model, ids, recorded, copies=1, **options):
    """What ``generate`` answers after a compressed text, with or without recorded steps."""
    cache = cp.fork(cp.prefill(model, ids, PRESS), copies)
    question = torch.cat([ids, tokens(3, batch=len(ids), seed=7)], dim=1)
    given = {cache_argument(model): cache, **GREEDY, **options}
    with recorded_as(recorded):
        return model.generate(question, attention_mask=torch.ones_like(question), **given)


@pytest.mark.usefixtures("clear_answers")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_gives_the_same_tokens(name, replays):
    model, ids = exact_tiny(name), tokens(40, batch=2)
    wanted = answered(model, ids, False)
    assert replays == []
    assert torch.equal(answered(model, ids, True), wanted)
    # Of eleven steps after the question three run as they are, and one is recorded.
    assert replays == ([] if name in RECURRENT else [2] * 7)


@pytest.mark.usefixtures("clear_answers")
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"repetition_penalty": 1.3},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_beams_several_answers_and_processors(options, replays):
    model, ids = exact_tiny("llama"), tokens(40)
    found = []
    for recorded in (False, True):
        torch.manual_seed(1)
        found.append(answered(model, ids, recorded, **options))
    assert torch.equal(*found)
    assert len(replays) > 5


def test_scores_of_every_step_are_its_own(replays):
    model, ids = exact_tiny("llama"), tokens(40)
    options = {"output_scores": True, "return_dict_in_generate": True}
    wanted, ours = (answered(model, ids, recorded, **options) for recorded in (False, True))
    # generate() gives scores in float32.
    close(*(torch.stack(found.scores).double() for found in (ours, wanted)))
    assert len(replays) == 7
    assert ours.past_key_values.get_seq_length() == wanted.past_key_values.get_seq_length() == 54


def test_one_recording_serves_every_cache_of_its_form(replays):
    model = exact_tiny("llama")
    for seed in range(3):
        ids = tokens(40, seed=seed)
        wanted = answered(model, ids, False)
        before = len(replays)
        assert torch.equal(answered(model, ids, True), wanted)
        assert len(replays) - before == (7 if seed == 0 else 11)
    assert len(steps._LATEST) == 1


def stepped(model, cache, n, recorded=True, **inputs):
    """Logits of further tokens, one by one."""
    ids = tokens(n, batch=compressed_layers(cache)[0].batch_size, seed=3).split(1, dim=1)
    with recorded_as(recorded):
        return torch.cat([forward(model, cache, input_ids=x, **inputs).logits for x in ids], dim=1)


def both(model, cache, n=8, **inputs):
    wanted = stepped(model, cp.fork(cache), n, False, **inputs)
    return stepped(model, cp.fork(cache), n, **inputs), wanted


CHANGES = {
    "crop": lambda cache: cache.crop(-2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "nothing": lambda cache: None,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_cache_that_changes_between_steps(name, replays):
    model = exact_tiny("llama")
    cache = cp.prefill(model, tokens(40, batch=2), PRESS)
    found = []
    for recorded in (False, True):
        held = cp.fork(cache)
        first = stepped(model, held, 6, recorded)
        CHANGES[name](held)
        found.append([first, stepped(model, held, 6, recorded)])
    for ours, wanted in zip(*found, strict=True):
        close(ours, wanted)
    assert replays


def test_a_tail_that_outgrows_its_buffer(replays):
    model = exact_tiny("llama")
    close(*both(model, cp.prefill(model, tokens(40), PRESS), 150))
    assert len(replays) > 140


def test_two_caches_in_turns(replays):
    model = exact_tiny("llama")
    caches = [cp.prefill(model, tokens(40, seed=i), PRESS) for i in range(2)]
    wanted = [stepped(model, cp.fork(cache), 8, False) for cache in caches]
    found = [[], []]
    for x in tokens(8, seed=3).split(1, dim=1):
        for i, cache in enumerate(caches):
            found[i].append(forward(model, cache, input_ids=x).logits)
    for ours, own in zip(found, wanted, strict=True):
        close(torch.cat(ours, dim=1), own)
    # The first step of each makes its tail; three run as they are, and one is recorded.
    assert len(replays) == 10


def test_padding_in_a_question_is_hidden(replays):
    model, ids = exact_tiny("llama"), tokens(40, batch=2)
    cache, mask = cp.prefill(model, ids, PRESS), torch.ones(2, 43, dtype=torch.long)
    mask[1, 40:42] = 0
    found = []
    for recorded in (False, True):
        held, seen = cp.fork(cache), mask
        given = {"input_ids": tokens(3, 2, seed=1), "attention_mask": seen}
        with recorded_as(recorded):
            logits = [forward(model, held, **given).logits]
            for x in tokens(8, batch=2, seed=3).split(1, dim=1):
                seen = torch.cat([seen, torch.ones(2, 1, dtype=torch.long)], dim=1)
                at = (seen.cumsum(-1) - 1)[:, -1:]
                given = {"input_ids": x, "attention_mask": seen, "position_ids": at}
                logits.append(forward(model, held, **given).logits)
        found.append(torch.cat(logits[1:], dim=1))
    close(*found)
    assert len(replays) == 4


def test_keys_of_some_channels_are_not_read_by_tables(replays):
    model = exact_tiny()
    press = cp.ThinKPress(0.5, window_size=6)
    close(*both(model, cp.prefill(model, tokens(40), press)))
    assert replays == []


@pytest.mark.parametrize("storage", ["int8", "int4", "int2"])
def test_quantized_pages(storage, replays):
    model = exact_tiny("llama")
    close(*both(model, cp.prefill(model, tokens(90), PRESS, storage=storage), 80))
    assert len(replays) > 60


def test_pairs_with_a_bias(replays):
    model, press = exact_tiny("llama"), cp.AdaKVPress(CountingPress(0.5))
    close(*both(model, cp.prefill(model, tokens(90), press), 20))
    assert len(replays) > 10


def hook(model):
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    return handle.remove


def train(model):
    model.train()
    return model.eval


def replace_weights(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    return lambda: None


@pytest.mark.parametrize("change", [hook, train])
def test_what_a_replay_would_not_hear_of_runs_as_it_is(change, replays):
    model = exact_tiny("llama")
    cache = cp.prefill(model, tokens(40), PRESS)
    stepped(model, cache, 6)
    before = len(replays)
    undo = change(model)
    stepped(model, cache, 3)
    assert len(replays) == before == 1
    undo()
    stepped(model, cache, 3)
    assert len(replays) == before + 3


def test_replaced_weights_are_recorded_anew(replays):
    model = exact_tiny("llama")
    cache = cp.prefill(model, tokens(40), PRESS)
    stepped(model, cache, 6)
    replace_weights(model)
    close(*both(model, cache))
    assert len(replays) > 2


def inputs_embeds(model):
    return {"input_ids": None, "inputs_embeds": model.get_input_embeddings()(tokens(1, seed=3))}


OTHER = {
    "embeddings": inputs_embeds,
    "hidden states": lambda model: {"output_hidden_states": True},
    "a mask of four dimensions": lambda model: {"attention_mask": torch.ones(1, 1, 1, 47).bool()},
    "a tuple": lambda model: {"return_dict": False},
}


@pytest.mark.parametrize("name", OTHER)
def test_other_forwards_run_as_they_are(name, replays):
    model = exact_tiny("llama")
    cache = cp.prefill(model, tokens(40), PRESS)
    stepped(model, cache, 6)
    assert len(replays) == 1
    given = {"input_ids": tokens(1, seed=3), **OTHER[name](model)}
    forward(model, cache, **{k: x for k, x in given.items() if x is not None})
    assert len(replays) == 1


def test_a_block_sees_every_step(replays):
    model = exact_tiny("llama")
    cache = cp.prefill(model, tokens(40), PRESS)
    stepped(model, cache, 6)
    with cp.DecodingPress(PRESS, 4, target_size=20)(model):
        stepped(model, cache, 6)
    assert len(replays) == 1


def test_a_model_that_reads_the_length_elsewhere_is_not_recorded(replays, caplog, monkeypatch):
    model = exact_tiny("llama")
    own = model.model.forward

    def longer(*args, **kwargs):
        out = own(*args, **kwargs)
        cache = kwargs[cache_argument(model)]
        out.last_hidden_state = out.last_hidden_state * cache.get_seq_length()
        return out

    monkeypatch.setattr(model.model, "forward", longer)
    cache = cp.prefill(model, tokens(40), PRESS)
    with caplog.at_level(logging.WARNING):
        close(*both(model, cache))
    assert replays == []
    assert [r.getMessage() for r in caplog.records if "not recorded" in r.getMessage()] == [
        "steps of LlamaForCausalLM are not recorded, and decode as they are: what was recorded "
        "gives something else"
    ]


def test_threads_on_one_model_each_get_their_own(replays):
    model = exact_tiny("llama")
    caches = [cp.prefill(model, tokens(40, seed=i), PRESS) for i in range(4)]
    wanted = [stepped(model, cp.fork(cache), 20, False) for cache in caches]
    found = [None] * 4

    def run(i):
        found[i] = stepped(model, caches[i], 20)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, own in zip(found, wanted, strict=True):
        close(ours, own)


def test_nothing_is_left_when_the_last_cache_is_gone(replays):
    model = exact_tiny("llama")
    plain = model.forward
    cache = cp.prefill(model, tokens(40), PRESS)
    assert "forward" in vars(model)
    stepped(model, cache, 6)
    segment = weakref.ref(compressed_layers(cache)[0].snapshot.segments[0])
    del cache
    gc.collect()
    assert segment() is None
    assert "forward" not in vars(model) and model.forward == plain


def test_a_recording_does_not_keep_its_model(replays):
    model = exact_tiny("llama")
    stepped(model, cp.prefill(model, tokens(40), PRESS), 8)
    assert replays
    gone, other = weakref.ref(model), exact_tiny("llama")
    del model
    gc.collect()
    assert gone() is None
    stepped(other, cp.prefill(other, tokens(40), PRESS), 8)
    assert [of() for of, _ in steps._LATEST] == [other]


def test_at_most_sixteen_recordings_stay(replays, monkeypatch):
    monkeypatch.setattr(steps, "MOST_RECORDINGS", 2)
    model = exact_tiny("llama")
    for b in (1, 2, 3):
        stepped(model, cp.prefill(model, tokens(20, batch=b), PRESS), 5)
    assert [form.batch for _, form in steps._LATEST] == [2, 3]


def test_configure_switches_recording_off(replays):
    model = exact_tiny("llama")
    stepped(model, cp.prefill(model, tokens(20), PRESS), 8, recorded=False)
    assert replays == []


def test_a_plain_cache_is_none_of_ours(replays):
    model = exact_tiny("llama")
    held = cp.prefill(model, tokens(20), PRESS)
    cache = DynamicCache()
    for x in tokens(8).split(1, dim=1):
        forward(model, cache, input_ids=x)
    assert replays == [] and held.get_seq_length() == 20


@pytest.mark.usefixtures("clear_answers")
def test_steps_are_compiled_before_they_are_recorded(replays, caplog):
    model, ids = exact_tiny(), tokens(40, batch=2)
    question = tokens(3, batch=2, seed=7)
    cache = cp.prefill(model, ids, PRESS)
    caches = [cp.fork(cache) for _ in range(3)]
    with recorded_as(False):
        wanted = cp.decode(model, cache, question, 12, eos_token_id=[])
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    for one in caches:
        found = cp.decode(model, one, question, 12, eos_token_id=[], compile=True)
        assert torch.equal(found, wanted)
    # Three steps run as they are and one is recorded; other caches need neither.
    assert replays == [2] * (7 + 11 + 11) and graphs["unique_graphs"] == 1
    assert not [x for x in caplog.records if x.name.startswith("cachepress")]


def test_what_cannot_be_compiled_is_recorded_as_it_is(replays, caplog, monkeypatch):
    def compiled(*args, **kwargs):
        raise RuntimeError("there is no compiler here")

    model, ids = exact_tiny(), tokens(40, batch=2)
    monkeypatch.setattr(torch, "compile", compiled)
    cp.decode(model, cp.prefill(model, ids, PRESS), ids[:, :3], 9, eos_token_id=[], compile=True)
    assert [x.message.partition(": ")[2] for x in caplog.records] == ["there is no compiler here"]
    assert replays == [2] * 3


def test_joined_caches_of_several_groups(replays):
    model = exact_tiny("llama")
    caches = [cp.prefill(model, tokens(40, seed=i), PRESS) for i in range(3)]
    batch = join([caches[:1], caches[1:]], 2)
    close(*both(model, batch, 70))
    assert len(replays) > 60 and set(replays) == {6}
    wanted = stepped(model, cp.fork(batch), 3, False)
    close(stepped(model, cp.fork(batch), 3), wanted)
    assert compressed_layers(batch)[0].get_seq_length() == 40
