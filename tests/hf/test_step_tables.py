"""Recorded steps that find pairs by the tables, as on a GPU, in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

import cachepress as cp
from cachepress.cache.joined import join
from cachepress.hf import recording
from cachepress.ops.paged_attention import triton as launched
from tests.bounds import close, near
from tests.hf.test_steps import PRESS, stepped
from tests.tiny import exact_tiny, tiny, tokens
from tests.tiny_cache import forward, recorded_as
from tests.waiting import Waits

LAYERS = 4


@pytest.fixture
def tables(monkeypatch, replays):
    """The plans of all launches, of steps that read tables on this processor."""
    found, real = [], launched.triton_attention

    def counted(query, plan, *args, **given):
        found.append(plan)
        return real(query, plan, *args, **given)

    monkeypatch.setattr(launched, "triton_attention", counted)
    monkeypatch.setattr(recording, "reads_tables", lambda query: True)
    return found


def joined(model):
    caches = [cp.prefill(model, tokens(30, seed=i), PRESS) for i in range(3)]
    return join([caches[:1], caches[1:]], 2)


CACHES = {
    "uneven": ("llama", lambda model: cp.prefill(model, tokens(40, 2), PRESS)),
    "int8": ("llama", lambda model: cp.prefill(model, tokens(90), PRESS, storage="int8")),
    "joined": ("llama", joined),
    "windows": ("gemma3", lambda model: cp.prefill(model, tokens(40, 2), PRESS)),
    "a soft cap": ("gemma2", lambda model: cp.prefill(model, tokens(12), PRESS)),
    "sinks": ("gpt_oss", lambda model: cp.prefill(model, tokens(40), PRESS)),
}


@pytest.mark.parametrize("name", CACHES)
def test_tables_say_where_pairs_are(name, tables, replays):
    kind, make = CACHES[name]
    model = tiny(kind)
    if kind != "gemma3":
        model.set_attn_implementation("eager")  # What knows soft caps and sinks.
    cache = make(model)
    wanted = stepped(model, cp.fork(cache), 9, False)
    near(stepped(model, cache, 9), wanted, torch.float32, 300, depth=LAYERS)
    assert len(replays) == 4
    # A further launch of each part compares the recorded step with an eager one.
    assert len(tables) == 5 * LAYERS * (2 if name == "joined" else 1)


def test_padding_in_a_window_is_hidden(tables, replays):
    model, found = tiny("gemma3"), []
    for recorded in (False, True):
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[0, :9] = 0
        cache = cp.prefill(model, tokens(20, 2), PRESS, attention_mask=mask)
        with recorded_as(recorded):
            for x in tokens(8, 2, seed=3).split(1, dim=1):
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
                at = (mask.cumsum(-1) - 1)[:, -1:]
                given = {"input_ids": x, "attention_mask": mask, "position_ids": at}
                found.append(forward(model, cache, **given).logits)
    near(torch.cat(found[8:]), torch.cat(found[:8]), torch.float32, 300, depth=LAYERS)
    assert len(replays) == 3


@pytest.mark.parametrize("name", ["uneven", "windows", "joined"])
def test_a_recorded_step_asks_the_device_for_nothing(name, monkeypatch, replays):
    """Law 12, as far as a processor can tell: the kernel itself is not run."""

    def not_run(query, plan, rule, heads, value_dim, added, **given):
        b, hq, n, _ = query.shape
        return query.new_zeros(b, n, hq, value_dim)

    kind, make = CACHES[name]
    model = tiny(kind)
    cache = make(model)
    monkeypatch.setattr(launched, "triton_attention", not_run)
    monkeypatch.setattr(recording, "reads_tables", lambda query: True)
    monkeypatch.setattr(recording.Recording, "same", lambda *args: True)
    stepped(model, cache, 6)
    before = len(replays)
    with Waits() as waits:
        stepped(model, cache, 80)  # Tails and windows outgrow their buffers meanwhile.
    assert waits.found == []
    assert len(replays) == before + 80


@pytest.mark.usefixtures("tables")
def test_what_the_kernel_cannot_compute_is_decoded_as_it_is(replays, caplog):
    model = exact_tiny()
    cache = cp.prefill(model, tokens(40), PRESS)
    wanted = stepped(model, cp.fork(cache), 6, False)
    close(stepped(model, cache, 6), wanted)
    assert replays == []
    (said,) = [x.getMessage() for x in caplog.records if x.name.startswith("cachepress")]
    assert said.endswith("the kernel needs Triton, and has no float64")
