"""Numbers that no model should make: presses keep their counts, and evict such pairs."""

from functools import cache

import pytest
import torch

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from tests.laws.presses import RATIO, WRAPPERS, every_scorer, name_of
from tests.tiny import tiny, tokens
from tests.tiny_cache import kept

NAN, INFINITY = float("nan"), float("inf")
ROWS = slice(7, 10)
SCORERS = every_scorer(RATIO)
BLIND = ("FastKVzipPress", "KVzapPress", "LagKVPress", "RandomPress", "KVzipPress", "KVgradPress")
"""They do not look at the keys of a row, or compare it with its neighbours only."""


def some(value):
    """Three pairs with other numbers."""

    def change(x):
        x = x.clone()
        x[:, ROWS] = value
        return x

    return change


DAMAGE = {
    "NaN": some(NAN),
    "infinity": some(INFINITY),
    "1e30": some(1e30),
    "3e38": some(3e38),
    "all zero": torch.zeros_like,
    "all equal": lambda x: torch.full_like(x, 0.5),
    "denormal": lambda x: x * 1e-40,
    "all 1e30": lambda x: x * 1e30,
    "all NaN": lambda x: torch.full_like(x, NAN),
}


@cache
def model():
    return tiny()


def damaged(press, where, change, n=40):
    """The cache that a press leaves of a model whose second layer makes such numbers."""
    module = getattr(model().model.layers[1].self_attn, where)
    handle = module.register_forward_hook(
        lambda m, args, out: change(out) if out.shape[1] > n // 2 else out
    )
    question = 2 if press.needs.question else None
    try:
        return cp.prefill(model(), tokens(n), press, question=question)
    finally:
        handle.remove()


@pytest.mark.parametrize("where", ["k_proj", "v_proj", "q_proj"])
@pytest.mark.parametrize("what", DAMAGE)
def test_every_scorer_keeps_its_count(what, where):
    for press in SCORERS:
        cache = damaged(press, where, DAMAGE[what])
        lengths = [store.lengths.sum().item() for store in compressed_layers(cache)]
        if press.budget.scope == "model":
            assert sum(lengths) == 4 * 40, press
        else:
            assert lengths == [40] * 4, press


@pytest.mark.parametrize("where", ["k_proj", "v_proj"])
@pytest.mark.parametrize("what", DAMAGE)
def test_every_wrapper_works(what, where):
    for name, wrapper in WRAPPERS.items():
        inner = cp.KeyDiffPress(RATIO) if name == "BlockPress" else SCORERS[-3]
        cache = damaged(wrapper.build(inner, RATIO), where, DAMAGE[what])
        assert min(store.lengths.amin().item() for store in compressed_layers(cache)) >= 1, name


@pytest.mark.parametrize("what", ["NaN", "infinity"])
@pytest.mark.parametrize("press", SCORERS, ids=name_of)
def test_pairs_that_are_not_finite_are_not_kept(press, what):
    if name_of(press) in BLIND:
        pytest.skip("does not look at the row's key")
    held = kept(damaged(press, "k_proj", DAMAGE[what]))[1][0]
    assert not any({7, 8, 9} & set(head) for head in held)


@pytest.mark.parametrize("press", SCORERS, ids=name_of)
def test_texts_of_one_and_two_tokens(press):
    for n in (1, 2):
        question = 1 if press.needs.question else None
        cache = cp.prefill(model(), tokens(n), press, question=question)
        lengths = [store.lengths.sum().item() for store in compressed_layers(cache)]
        # At least one pair stays for each group that competes: a head, or a layer.
        assert lengths == [2 if press.budget.scope == "head" or n == 2 else 1] * 4
