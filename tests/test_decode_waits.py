"""The loop that decodes waits for the device once in 16 tokens.

The device is a made-up one, and every number that is read from it is counted.
"""

import pytest
import torch

import cachepress as cp
from tests import placed
from tests.tiny import tiny, tokens
from tests.waiting import Waits

DEVICE = torch.device("meta:0")
RAGGED = cp.AdaKVPress(cp.KnormPress(0.5))
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9}


def waits_of(new, monkeypatch, **options):
    """What is asked of the device while tokens are decoded after one of each text."""
    model, ids, one = tiny(), tokens(40, batch=2), tokens(1, batch=2, seed=7)
    with RAGGED(model):
        pass  # The model is tried out before.
    placed.spread(model, (str(DEVICE), str(DEVICE)))
    tolist = placed.Placed.tolist
    with placed.devices():
        cache = cp.prefill(model, placed.Placed(ids, DEVICE), RAGGED)
        with Waits(cpu_counts=False) as waits, monkeypatch.context() as patch:
            patch.setattr(
                placed.Placed, "tolist", lambda x: waits.found.append("tolist") or tolist(x)
            )
            out = cp.decode(model, cache, placed.Placed(one, DEVICE), new, **options)
    assert out.shape == (2, new)
    return waits.found


@pytest.mark.parametrize(("new", "looks"), [(1, 1), (16, 1), (17, 2), (40, 3)])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_host_looks_once_in_sixteen_tokens(new, looks, options, monkeypatch):
    """Once the tokens that are given are checked; without ends that is all."""
    found = waits_of(new, monkeypatch, eos_token_id=[1000], **options)
    assert found == ["tolist", *["aten::_local_scalar_dense"] * looks]
    assert waits_of(new, monkeypatch, eos_token_id=[], **options) == ["tolist"]
