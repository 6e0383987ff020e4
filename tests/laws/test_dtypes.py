"""Every type of numbers, autocast, and another default type: right, by the epsilon of the type."""

from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.cache.masks import TextMask
from cachepress.hf import cache_argument
from cachepress.ops import AttentionRule
from cachepress.ops.paged_attention.naive import naive_attention
from tests.dense import dense_logits, mask_and_positions
from tests.laws.test_matrix import QUESTION, batch, build, of_each
from tests.tiny import exact_tiny, tiny, tokens
from tests.tiny_cache import kept

PRESSES = {
    "even": cp.KnormPress(0.5),
    "uneven": cp.AdaKVPress(cp.KnormPress(0.5)),
    "whole": cp.KnormPress(0.0),
    "across layers": cp.AdaKVPress(cp.SnapKVPress(0.6, window_size=4), scope="model"),
}
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALVES]
ROUNDED, SUMMED = 16, 256
"""How many epsilons of its type the logits of two ways to compute attention may be apart, as a root
mean square relative to their own. Half types are summed in float32, and what attention gives is
rounded once in each of four layers; the wider ones err by an epsilon for each of some 50 terms."""


def bound(dtype):
    return (ROUNDED if dtype in HALVES else SUMMED) * torch.finfo(dtype).eps


def apart(ours, wanted):
    ours, wanted = ours.double(), wanted.double()
    return float((ours - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def close_in(dtype, ours, wanted):
    assert bool(ours.isfinite().all()) and bool(wanted.isfinite().all())
    assert apart(ours, wanted) <= bound(dtype)


def answer(model, cache, ids, question, mask):
    """Logits of a question after a text, where it is not padding."""
    longer = None if mask is None else torch.cat([mask, torch.ones_like(question)], dim=1)
    given = {cache_argument(model): cache}
    given |= mask_and_positions(longer, ids.shape[1], question.shape[1])
    with torch.no_grad():
        return model(question, **given).logits


@pytest.mark.parametrize("company", ["alone", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("press", PRESSES)
def test_a_question_is_answered_as_from_a_masked_whole_cache(press, dtype, attention, company):
    model = exact_tiny() if dtype == torch.float64 else tiny().to(dtype)
    model.set_attn_implementation(attention)
    _, ids, mask = batch(company)
    cache = cp.prefill(model, ids, PRESSES[press], attention_mask=mask)
    for n in (1, 5, 20):
        question = tokens(n, batch=len(ids), seed=7)
        with torch.no_grad():
            wanted = dense_logits(model, cache, ids, question, mask)[1]
        close_in(dtype, answer(model, cp.fork(cache), ids, question, mask), wanted)


@pytest.mark.parametrize("n", [1, 5, 20])
@pytest.mark.parametrize("company", ["alone", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("press", PRESSES)
def test_under_autocast_too(press, half, attention, company, n):
    model = tiny()
    model.set_attn_implementation(attention)
    _, ids, mask = batch(company)
    question = tokens(n, batch=len(ids), seed=7)
    with torch.no_grad(), torch.autocast("cpu", dtype=half):
        cache = cp.prefill(model, ids, PRESSES[press], attention_mask=mask)
        wanted = dense_logits(model, cache, ids, question, mask)[1]
        ours = answer(model, cp.fork(cache), ids, question, mask)
    close_in(half, ours, wanted)
    # Continued without autocast, the values of the text stay the half numbers that they are.
    exact = answer(model, cp.fork(cache), ids, question, mask)
    assert 0 < apart(exact, wanted) <= bound(half)
    with torch.autocast("cpu", dtype=half):
        continued = cp.prefill(model, question, None, cp.fork(cache))
    assert compressed_layers(continued)[0].get_seq_length() == ids.shape[1] + n


@pytest.mark.parametrize("press", PRESSES)
@pytest.mark.parametrize("half", HALVES)
def test_forwards_with_and_without_autocast_may_alternate(press, half):
    """What a forward without it appends is not rounded to the half type of those before."""
    model, ids = tiny(), tokens(40)
    for first in (True, False):
        with torch.autocast("cpu", dtype=half, enabled=first):
            cache = cp.prefill(model, ids, PRESSES[press])
        for seed, n in enumerate((1, 1, 20, 3, 1)):
            with torch.autocast("cpu", dtype=half, enabled=(seed % 2 == 0) != first):
                new = answer(model, cache, ids, tokens(n, seed=seed), None)
            assert bool(new.isfinite().all())
        plain = DynamicCache()
        name = cache_argument(model)
        with torch.no_grad():
            with torch.autocast("cpu", dtype=half, enabled=first):
                model(ids, **{name: plain})
            for seed, n in enumerate((1, 1, 20, 3, 1)):
                with torch.autocast("cpu", dtype=half, enabled=(seed % 2 == 0) != first):
                    wanted = model(tokens(n, seed=seed), **{name: plain}).logits
        if press == "whole":
            close_in(half, new, wanted)
        store = compressed_layers(cache)[0]
        assert (store.keys.dtype, store.values.dtype) == (torch.float32, torch.float32)


@of_each
def test_every_press_works_under_autocast(scorer, wrapper):
    """And it keeps as many pairs as it does without."""
    model, press = tiny(), build(scorer, wrapper)
    _, ids, mask = batch("padded" if len(scorer) % 2 else "alone")
    lengths = []
    for enabled in (True, False):
        cache = DynamicCache()
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)
        with torch.no_grad(), autocast, press(model, question=QUESTION):
            model(ids, **{cache_argument(model): cache}, **mask_and_positions(mask, 0, 41))
            given = mask
            for seed in range(9):
                if given is not None:
                    given = torch.cat([given, given.new_ones(len(ids), 1)], dim=1)
                step = tokens(1, batch=len(ids), seed=seed)
                place = mask_and_positions(given, 41 + seed, 1)
                out = model(step, **{cache_argument(model): cache}, **place).logits
                assert bool(out.isfinite().all())
        lengths.append([store.lengths.sum().item() for store in compressed_layers(cache)])
    counted = press.budget.scope != "model" and wrapper not in FREE
    assert not counted or lengths[0] == lengths[1]


FREE = ("DMSPress", "SimLayerKVPress")
"""Wrappers whose numbers of pairs hang on scores."""


@contextmanager
def default_type(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@of_each
def test_the_default_type_of_torch_changes_nothing(scorer, wrapper):
    """It is set for the text, for the question, or for both."""
    model, press = tiny(), build(scorer, wrapper)
    _, ids, mask = batch("padded" if len(scorer) % 2 else "alone")
    question = tokens(20, batch=len(ids), seed=7)

    def run(first, then):
        with default_type(first):
            cache = cp.prefill(model, ids, press, attention_mask=mask, question=QUESTION)
        with default_type(then), press(model, turns="first", question=QUESTION):
            return cache, answer(model, cache, ids, question, mask)

    usual = torch.float32
    cache, wanted = run(usual, usual)
    for first, then in [(torch.float64, usual), (usual, torch.bfloat16), (torch.float16,) * 2]:
        other, ours = run(first, then)
        assert kept(other) == kept(cache)
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), *[(x, x) for x in DTYPES]])
@pytest.mark.parametrize("press", PRESSES)
def test_attention_over_pairs_of_every_type(press, types, n, autocast):
    """Against the specification over the very numbers that are stored, in float64."""
    cache = cp.prefill(tiny(), tokens(40, batch=2), PRESSES[press])
    store = compressed_layers(cache)[1]
    held = store.snapshot.rows()
    half = type(held)(held.keys.to(types[0]), held.values.to(types[1]), held.positions, held.full)
    real = half.text_positions() >= 0
    store.keep(half, real)
    query = torch.randn(2, 4, n, 8, generator=torch.Generator().manual_seed(0)).to(types[0])
    rows = [
        [
            (half.keys[b, h][real[b, h]].double(), half.values[b, h][real[b, h]].double())
            for h in range(2)
        ]
        for b in range(2)
    ]
    wanted = naive_attention(query.double().view(2, 2, 2, n, 8), rows, AttentionRule(0.3))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = store.snapshot.attend(query, TextMask(None, n), AttentionRule(0.3))
    assert ours.dtype == query.dtype
    # Computed in float32 and rounded once; a sum of 40 weights errs by 40 epsilons at most.
    sums = 40 * torch.finfo(torch.float64 if types[0] == torch.float64 else torch.float32).eps
    bound = (torch.finfo(query.dtype).eps + sums) * wanted.abs().max()
    assert (ours.transpose(1, 2).double() - wanted.view(2, 4, n, 8)).abs().max() <= bound
