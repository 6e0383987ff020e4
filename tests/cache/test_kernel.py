"""A compressed cache read by the GPU's kernel, in Triton's interpreter, as without it."""

import pytest
import torch

pytest.importorskip("triton")

import cachepress as cp
from cachepress.cache import kernel
from cachepress.cache.batch import compressed_layers
from cachepress.cache.joined import join
from tests.bounds import near
from tests.counting import CountingPress
from tests.tiny import tiny, tokens
from tests.tiny_cache import forward
from tests.waiting import Waits

SCORED = cp.KnormPress(0.5)
CACHES = {
    "even": lambda model, ids: cp.prefill(model, ids, SCORED),
    "uneven": lambda model, ids: cp.prefill(model, ids, cp.AdaKVPress(SCORED)),
    "int8": lambda model, ids: cp.prefill(model, ids, SCORED, storage="int8"),
    "int4": lambda model, ids: cp.prefill(model, ids, SCORED, storage=cp.Codec(4, residual=8)),
    "int2": lambda model, ids: cp.prefill(model, ids, SCORED, storage=cp.Codec(2, 0, 4)),
    "pages": lambda model, ids: cp.prefill(model, ids, cp.QuestPress(cp.KnormPress(0.1), 3)),
    "uneven pages": lambda model, ids: cp.prefill(
        model, ids, cp.QuestPress(cp.AdaKVPress(cp.KnormPress(0.2)), 2)
    ),
    "channels": lambda model, ids: cp.prefill(model, ids, cp.ThinKPress(0.5)),
    "biased": lambda model, ids: cp.prefill(model, ids, CountingPress(0.5)),
    "biased, uneven": lambda model, ids: cp.prefill(model, ids, cp.AdaKVPress(CountingPress(0.5))),
    "biased, int8": lambda model, ids: cp.prefill(model, ids, CountingPress(0.5), storage="int8"),
    "biased pages": lambda model, ids: cp.prefill(
        model, ids, cp.QuestPress(cp.AdaKVPress(CountingPress(0.2)), 2)
    ),
    "whole": lambda model, ids: cp.prefill(model, ids, cp.KnormPress(0.0)),
}


@pytest.fixture
def launches(monkeypatch):
    """What the kernel was launched for, while it is used on this processor."""
    from cachepress.ops.paged_attention import triton as launched

    found, real = [], launched.triton_attention

    def counted(query, plan, *args, **kwargs):
        found.append(plan)
        return real(query, plan, *args, **kwargs)

    monkeypatch.setattr(launched, "triton_attention", counted)
    return found


def decoded(model, cache, monkeypatch, texts, **inputs):
    """Logits of further tokens, with and without the kernel."""
    found = []
    for used in (False, True):
        monkeypatch.setattr(kernel, "is_usable", lambda query, used=used: used)
        held = cp.fork(cache)
        found.append(
            torch.cat([forward(model, held, input_ids=x, **inputs).logits for x in texts], dim=1)
        )
    return found


@pytest.mark.parametrize("name", CACHES)
def test_further_tokens_of_every_storage(name, monkeypatch, launches):
    model, ids = tiny(), tokens(150)
    cache = CACHES[name](model, ids)
    texts = [tokens(3, seed=1), *tokens(4, seed=2).split(1, dim=1)]
    wanted, ours = decoded(model, cache, monkeypatch, texts)
    assert len(launches) == (0 if name == "channels" else len(texts) * len(cache.layers))
    near(ours, wanted, torch.float32, 300, depth=4)


@pytest.mark.parametrize("model_name", ["gemma2", "gpt_oss", "qwen3"])
def test_soft_caps_and_sinks(model_name, monkeypatch, launches):
    model = tiny(model_name)
    model.set_attn_implementation("eager")
    cache = cp.prefill(model, tokens(60), cp.AdaKVPress(SCORED))
    wanted, ours = decoded(model, cache, monkeypatch, tokens(3, seed=2).split(1, dim=1))
    assert launches
    near(ours, wanted, torch.float32, 300, depth=4)


def test_tokens_of_a_padded_batch(monkeypatch, launches):
    model, ids = tiny(), tokens(40, batch=2)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    cache = cp.prefill(model, ids, cp.AdaKVPress(SCORED), attention_mask=mask)
    asked = torch.cat([mask, torch.tensor([[1, 1, 1], [0, 0, 1]])], dim=1)
    wanted, ours = decoded(
        model, cache, monkeypatch, [tokens(3, batch=2, seed=1)], attention_mask=asked
    )
    assert launches
    near(ours[:, -1], wanted[:, -1], torch.float32, 300, depth=4)


def test_a_fork_of_many_reads_shared_pairs_once_for_all(monkeypatch, launches):
    model = tiny()
    cache = cp.fork(cp.prefill(model, tokens(60), cp.AdaKVPress(SCORED)), 3)
    texts = tokens(3, batch=3, seed=2).split(1, dim=1)
    wanted, ours = decoded(model, cache, monkeypatch, texts)
    near(ours, wanted, torch.float32, 300, depth=4)
    shared, own = (launches[0].table[8 + 16 * i :] for i in range(2))
    assert [int(shared[1]), int(shared[4])] == [2, 6]  # spans of one sequence, queries of three
    assert [int(own[1]), int(own[4])] == [6, 2]


def test_a_plan_holds_until_the_storage_changes(monkeypatch, launches):
    model = tiny()
    cache = cp.prefill(model, tokens(60), cp.AdaKVPress(SCORED))
    monkeypatch.setattr(kernel, "is_usable", lambda query: True)
    for i in range(3):
        forward(model, cache, input_ids=tokens(1, seed=i))
    layers = len(cache.layers)
    assert launches[layers] is launches[2 * layers]
    allocated = compressed_layers(cache)[0].tensors()
    assert sum(x is launches[2 * layers].table for x in allocated) == 1
    for layer in compressed_layers(cache):
        layer.crop(-2)
    forward(model, cache, input_ids=tokens(1, seed=5))
    again = launches[-layers]
    cache.reorder_cache(torch.tensor([0, 0]))
    forward(model, cache, input_ids=tokens(1, batch=2, seed=5))
    assert launches[-layers] is not again


@pytest.mark.parametrize(
    "name", ["even", "uneven", "int8", "int4", "whole", "pages", "uneven pages", "biased pages"]
)
def test_a_decoded_step_asks_the_device_for_nothing(name, monkeypatch):
    """Law 12, as far as a processor can tell: the kernel itself is not run."""
    from cachepress.ops.paged_attention import triton as launched

    def not_run(query, plan, rule, heads, value_dim, added, **given):
        b, hq, n, _ = query.shape
        return query.new_zeros(b, n, hq, value_dim)

    model = tiny()
    cache = CACHES[name](model, tokens(150))
    monkeypatch.setattr(launched, "triton_attention", not_run)
    monkeypatch.setattr(kernel, "is_usable", lambda query: True)
    forward(model, cache, input_ids=tokens(1))  # Makes the plan, and the tail.
    with Waits() as waits:
        for i in range(110):  # Pages are made of the oldest tokens meanwhile.
            forward(model, cache, input_ids=tokens(1, seed=i))
    assert waits.found == []


def test_joined_caches(monkeypatch, launches):
    model = tiny()
    caches = [cp.prefill(model, tokens(60, seed=i), cp.AdaKVPress(SCORED)) for i in range(2)]
    even = [cp.prefill(model, tokens(60, seed=i), SCORED) for i in range(2)]
    joined = join([caches, even], 2)
    wanted, ours = decoded(model, joined, monkeypatch, [tokens(1, batch=8, seed=3)])
    near(ours, wanted, torch.float32, 300, depth=4)
    assert len(launches) == 2 * len(joined.layers)


def test_pages_are_chosen_again_for_every_token(monkeypatch, launches):
    model = tiny()
    cache = CACHES["pages"](model, tokens(150))
    monkeypatch.setattr(kernel, "is_usable", lambda query: True)
    for i in range(2):
        forward(model, cache, input_ids=tokens(1, seed=i))
    ((pages, lengths),) = compressed_layers(cache)[-1].snapshot.plans.pages
    (segment,) = compressed_layers(cache)[-1].snapshot.segments
    assert pages.shape == (2, 3) and segment.layout.most_pages > 3
    first, counts = segment.layout.first_page, segment.layout.pages_of
    assert torch.equal(pages[:, -1], (first + torch.tensor(counts) - 1).int())  # the newest
    assert lengths.tolist() == [2 * 32 + (n - 1) % 32 + 1 for n in segment.layout.lengths]
