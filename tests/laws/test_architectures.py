"""Every press and every wrapper on the architectures that matter most."""

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from tests.laws.presses import RATIO, SOURCES, WRAPPERS, every_scorer, name_of
from tests.learned import learned
from tests.tiny import exact_tiny, tokens
from tests.tiny_cache import forward, kept

NAMES = ("llama", "qwen3", "phi3", "gemma3", "gpt_oss")
OWN = [press for press in every_scorer(RATIO) if press.budget.scope != "head"]
OWN = [press for press in OWN if type(press) not in SOURCES]
PRESSES = {
    **{name: wrapper.build(cp.KeyDiffPress(RATIO), RATIO) for name, wrapper in WRAPPERS.items()},
    **{name_of(press): press for press in [*OWN, cp.FinchPress(RATIO), cp.PyramidKVPress(RATIO)]},
}


def found_on_the_model(name):
    """A press that finds out about the heads of a model by itself."""
    if name == "HeadKVPress":
        return cp.HeadKVPress(cp.KeyDiffPress(RATIO))
    return cp.DuoAttentionPress(RATIO, sink_size=2, recent_size=6)


@pytest.mark.parametrize("architecture", NAMES)
@pytest.mark.parametrize("kind", SOURCES)
def test_what_was_learned_of_a_model_is_used_on(kind, architecture):
    press = next(p for p in every_scorer(RATIO, architecture) if type(p) is kind)
    cache = cp.prefill(exact_tiny(architecture), tokens(41), press)
    assert cp.size_of(cache).ratio == pytest.approx(21 / 41)
    with pytest.raises(cp.CachepressError, match="was made for a"):
        cp.prefill(exact_tiny("gpt2"), tokens(41), press)


@pytest.mark.parametrize("architecture", NAMES)
@pytest.mark.parametrize("name", PRESSES)
def test_works_on(name, architecture):
    model, ids, press = exact_tiny(architecture), tokens(41), PRESSES[name]
    n_layers = len(compressed_layers(cp.prefill(model, ids[:, :2], cp.KnormPress(0.0))))
    if name == "LUKVPress":
        press = cp.LUKVPress(cp.KeyDiffPress(RATIO), curve=learned(architecture))
    if name in ("DuoAttentionPress", "HeadKVPress"):
        press = found_on_the_model(name)
    if name == "PerLayerCompressionPress":
        press = cp.PerLayerCompressionPress(cp.KeyDiffPress(), [RATIO] * n_layers)
    cache = DynamicCache()
    with press(model, question=3):
        forward(model, cache, input_ids=ids)
        logits = forward(model, cache, input_ids=tokens(1)).logits
    assert torch.isfinite(logits).all()
    assert cache.get_seq_length() == 42
    for layer in kept(cache):
        for head in layer[0]:
            assert head == sorted(set(head))
            assert head[-1] == 41
    promised = WRAPPERS.get(name)
    if promised is None or promised.counts is not None:
        rows = sum(int(store.lengths.sum()) for store in compressed_layers(cache))
        each = 20 if promised is None else promised.counts(41)[1]
        assert rows == n_layers * 2 * (each + 1)
