"""Compressing a layer asks the device for nothing where counts are known, and for one thing else.

The device is a made-up one, and every number that is read from it is counted.
"""

import pytest
import torch

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.hf import forward as forwards
from tests import placed
from tests.tiny import tiny, tokens
from tests.waiting import Waits

KNOWN = {
    "knorm": cp.KnormPress(0.5),
    "fixed": cp.KnormPress(n_kept=30),
    "bytes": cp.KnormPress(max_bytes="50kB"),
    "keydiff": cp.KeyDiffPress(0.5),
    "streaming": cp.StreamingLLMPress(0.5),
    "random": cp.RandomPress(0.5),
    "tova": cp.TOVAPress(0.5),
    "snapkv": cp.SnapKVPress(0.5, window_size=8),
    "pyramid": cp.PyramidKVPress(0.5, window_size=8),
    "per layer": cp.PerLayerCompressionPress(cp.KnormPress(), [0.5, 0.6, 0.5, 0.7]),
    "nothing": cp.KnormPress(0.0),
}
COMPETING = {
    "adakv": cp.AdaKVPress(cp.SnapKVPress(0.5, window_size=8)),
    "uneven knorm": cp.AdaKVPress(cp.KnormPress(0.7)),
}


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the device in each compression of a layer."""
    found, real, tolist = [], forwards.compress, placed.Placed.tolist

    def counted(*args):
        with Waits(cpu_counts=False) as waits:
            found.append(waits.found)
            return real(*args)

    def listed(x):
        found[-1].append("tolist")
        return tolist(x)

    monkeypatch.setattr(placed.Placed, "tolist", listed)
    monkeypatch.setattr(forwards, "compress", counted)
    return found


def compressed(press):
    model, ids = tiny(), tokens(90, batch=2)
    with cp.KnormPress(0.5)(model):
        pass  # The model is tried out before.
    placed.spread(model, ("meta:0", "meta:0"))
    with placed.devices():
        return cp.prefill(model, placed.Placed(ids, torch.device("meta:0")), press)


@pytest.mark.parametrize("name", KNOWN)
def test_nothing_is_asked_where_counts_are_known(name, asked):
    cache = compressed(KNOWN[name])
    assert [len(waits) for waits in asked] == [0] * 4, asked
    lengths = [layer.lengths.unique().tolist() for layer in compressed_layers(cache)]
    assert all(len(each) == 1 for each in lengths)


@pytest.mark.parametrize("name", COMPETING)
def test_one_question_is_asked_where_heads_compete(name, asked):
    cache = compressed(COMPETING[name])
    assert [len(waits) for waits in asked] == [1] * 4, asked
    assert len(compressed_layers(cache)[0].lengths.unique()) > 1
