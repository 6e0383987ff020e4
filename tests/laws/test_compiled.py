"""A decoded step is one graph for torch.compile, made once, and gives what it gives without."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.stepping import count_appended
from cachepress.errors import ForeignAttentionError
from cachepress.hf import cache_argument, steps
from tests.bounds import close
from tests.dense import mask_and_positions
from tests.tiny import ARCHITECTURES, exact_tiny, randn, tokens

NOT_COMPILED = {"qwen3_moe", "qwen3_next", "gpt_oss"}
"""Which experts are asked decides in transformers what Python does next."""
GROWING = {"gemma2", "gemma3"}
"""Their windows are tensors of transformers that grow until they are full, and compile anew."""
STEPS = 50
PRESS = cp.AdaKVPress(cp.KnormPress(0.5))
STORED = {
    "even": (cp.KnormPress(0.5), "full"),
    "int4": (PRESS, "int4"),
    "quest": (cp.QuestPress(cp.KnormPress(0.5)), "full"),
    "channels": (cp.ThinKPress(0.5, window_size=6), "full"),
    "whole": (cp.KnormPress(0.0), "full"),
}


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def once():
    """From here on nothing may be compiled a second time."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def compiled(model, **options):
    """A step of a model in one graph."""
    name = cache_argument(model)

    def step(ids, cache, **given):
        return model(input_ids=ids, **{name: cache}, **given).logits

    return step, torch.compile(step, backend="eager", fullgraph=True, **options)


def agree(model, cache, n=STEPS):
    """Decode from a cache and from a copy of it, which is compiled."""
    (step, graph), other = compiled(model), cp.fork(cache)
    with torch.no_grad():
        for seed in range(n):
            ids = tokens(1, batch=compressed_layers(cache)[0].batch_size, seed=seed)
            close(graph(ids, other), step(ids, cache))
    assert other.get_seq_length() == cache.get_seq_length()


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("name", [x for x in ARCHITECTURES if x not in NOT_COMPILED | GROWING])
def test_a_step_is_one_graph_for_fifty_tokens(name):
    model = exact_tiny(name)
    agree(model, cp.prefill(model, tokens(40, batch=2), PRESS))


@pytest.mark.parametrize("name", sorted(GROWING))
def test_so_is_one_with_windows_that_are_full(name):
    model = exact_tiny(name)
    agree(model, cp.prefill(model, tokens(40, batch=2), PRESS), 4)


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("stored", STORED)
def test_so_is_one_of_every_storage(stored):
    press, storage = STORED[stored]
    model = exact_tiny()
    agree(model, cp.prefill(model, tokens(150, seed=3), press, storage=storage))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_so_is_one_of_a_padded_batch(attention):
    model, ids, mask = exact_tiny(), tokens(40, batch=2), torch.ones(2, 40, dtype=torch.long)
    model.set_attn_implementation(attention)
    mask[1, :7] = 0
    cache, name = DynamicCache(), cache_argument(model)
    with PRESS(model), torch.no_grad():
        model(input_ids=ids, **{name: cache}, **mask_and_positions(mask, 0, 40))
    other, (step, graph) = cp.fork(cache), compiled(model, dynamic=True)
    for seed in range(6):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        given = {"attention_mask": mask, **mask_and_positions(mask, 40 + seed, 1)}
        with torch.no_grad():
            token = tokens(1, batch=2, seed=seed)
            close(graph(token, other, **given), step(token, cache, **given))


def test_one_graph_serves_several_caches():
    model, ids = exact_tiny(), tokens(40, batch=2)
    (step, graph), long = compiled(model), tokens(63, batch=2)
    caches = [cp.prefill(model, ids, PRESS), cp.prefill(model, long, cp.KnormPress(0.3))]
    others = [cp.fork(caches[0]), pickle.loads(pickle.dumps(caches[1]))]
    with torch.no_grad():
        for seed in range(5):
            token = tokens(1, batch=2, seed=seed)
            for cache, other in zip(caches, others, strict=True):
                close(graph(token, other), step(token, cache))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_one_graph_serves_caches_in_inference_mode():
    model = exact_tiny()
    (step, graph), ids = compiled(model), tokens(40)
    cache = cp.prefill(model, ids, PRESS)
    with torch.inference_mode():
        others = [cp.fork(cache), cp.prefill(model, ids, PRESS)]
        expected = [step(tokens(1, seed=seed), cache) for seed in range(3)]
        for other in others:
            close(
                torch.cat([graph(tokens(1, seed=i), other) for i in range(3)]), torch.cat(expected)
            )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_mask_of_each_head_and_attention_weights_are_those_without_a_graph():
    model = exact_tiny()
    model.set_attn_implementation("eager")
    cache = cp.prefill(model, tokens(40, batch=2), PRESS)
    other, graph = cp.fork(cache), torch.compile(model, backend="eager")
    for weighed in (False, True, True):
        mask = randn(2, 4, 1, cache.get_seq_length() + 1)
        given = {"attention_mask": mask, "output_attentions": weighed, "input_ids": tokens(1, 2)}
        with torch.no_grad():
            found = graph(past_key_values=other, **given)
            expected = model(past_key_values=cache, **given)
        close(found.logits, expected.logits)
        assert len(found.attentions or ()) == 4 * weighed
        for weights, others in zip(found.attentions or (), expected.attentions or (), strict=True):
            close(weights, others)


def test_a_token_that_a_recorded_step_appended_counts_for_the_next_mask(monkeypatch):
    keys = torch.zeros(1, 1, 1023, 4)
    layer = CompressedLayer.adopt(keys, keys)
    count_appended([layer], [(layer,)])
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    assert layer.get_mask_sizes(1) == (2048, 0)


def test_steps_that_are_recorded_elsewhere_are_traced(monkeypatch):
    monkeypatch.setattr(steps, "records_on", lambda device: True)
    model = exact_tiny()
    agree(model, cp.prefill(model, tokens(40), PRESS), 5)


def test_the_cache_of_another_model_is_an_error():
    model = exact_tiny()
    cache, other = cp.prefill(model, tokens(40), PRESS), copy.deepcopy(model)
    graph = torch.compile(other, backend="eager")
    with torch.no_grad(), pytest.raises(ForeignAttentionError):
        graph(input_ids=tokens(1), **{cache_argument(model): cache})
