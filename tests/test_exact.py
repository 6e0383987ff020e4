"""The float64 models of the tests: nothing in them is computed in less."""

import pytest
import torch
from transformers import DynamicCache

from cachepress import budgets
from tests.bounds import close, margin, near, no_close_answers, no_near_ties, rounding
from tests.elsewhere import elsewhere
from tests.exact import narrow
from tests.tiny import ARCHITECTURES, exact_tiny, tiny, tokens
from tests.tiny_cache import forward


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_is_computed_in_less_than_float64(name, attention):
    model = exact_tiny(name)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("has no attention but eager")
    model.set_attn_implementation(attention)
    cache = DynamicCache(config=model.config)
    with narrow() as found:
        logits = forward(model, cache, input_ids=tokens(40)).logits
        step = forward(model, cache, input_ids=tokens(1)).logits
    assert found == set()
    assert (logits.dtype, step.dtype) == (torch.float64, torch.float64)
    single = tiny(name)
    single.set_attn_implementation(attention)
    wanted = forward(single, input_ids=tokens(40)).logits
    near(wanted, logits, torch.float32, terms=400, depth=4)


def test_a_model_that_is_only_made_double_computes_in_float32_and_is_found_out():
    with narrow() as found:
        forward(tiny().double(), input_ids=tokens(8))
    assert any("modeling_llama" in place for _, place in found)


def test_the_order_of_a_text_batch_changes_nothing():
    """Each sequence of a batch by itself: other products, sums in another order."""
    model, ids = exact_tiny(), tokens(33, batch=3)
    logits = forward(model, input_ids=ids).logits
    for row, text in zip(logits, ids, strict=True):
        close(row, forward(model, input_ids=text[None]).logits[0])


def test_close_takes_nothing_but_float64():
    x = torch.ones(3)
    with pytest.raises(AssertionError):
        close(x, x)
    with pytest.raises(AssertionError):
        close(x.double(), x.double() + 1e-8)
    close(x.double(), x.double() + 1e-10)


def test_a_bound_follows_from_the_type():
    assert rounding(torch.float32, terms=100, depth=4) == pytest.approx(400 * 2.0**-23)
    assert rounding(torch.bfloat16, terms=1) == 2.0**-7
    x = torch.full((2,), 3.0)
    near(x, x + 2e-6, torch.float32, terms=10)
    with pytest.raises(AssertionError):
        near(x, x + 5e-6, torch.float32, terms=10)


def test_the_margin_is_between_the_last_that_stays_and_the_first_that_goes():
    scores = torch.tensor([[[4.0, 1.0, 3.0, 9.0], [2.0, 2.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0]]])
    mask = torch.tensor([[[1, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]]]).bool()
    found = margin(scores, torch.ones_like(mask), mask)
    assert found.tolist() == [[0.25, 0.0, float("inf")]]


def test_a_choice_that_hangs_on_rounding_is_found_out():
    best = budgets.best
    valid, one = torch.ones(1, 1, 3).bool(), torch.tensor([[[1.0]]])
    with no_near_ties():
        budgets.best(torch.tensor([[[1.0, 1.0, 0.5]]]), valid, one)
        with pytest.raises(AssertionError, match="hangs on"):
            budgets.best(torch.tensor([[[1.0, 1 + 1e-12, 0.5]]], dtype=torch.float64), valid, one)
    assert budgets.best is best


def test_a_token_that_hangs_on_rounding_is_found_out():
    before = torch.argmax, torch.Tensor.argmax
    clear, tied = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[3.0, 3.0, -torch.inf]])
    near_by = torch.tensor([[1.0, 3.0, 3.0 + 5e-7]])
    with no_close_answers():
        assert torch.argmax(clear, dim=-1).tolist() == clear.argmax(-1).tolist() == [1]
        assert tied.argmax(-1).shape == (1,)
        assert near_by.double().argmax(-1).tolist() == [2]
        for take in (torch.argmax, torch.Tensor.argmax):
            with pytest.raises(AssertionError, match="hangs on"):
                take(near_by, dim=-1)
    assert (torch.argmax, torch.Tensor.argmax) == before


def test_no_token_comes_twice():
    ids = tokens(93, batch=2)
    assert [len(set(row)) for row in ids.tolist()] == [93, 93]
    assert not torch.equal(ids[0], ids[1])


@pytest.mark.parametrize(
    ("own", "other"),
    [("AVX512", "avx2"), ("AVX2", "default"), ("DEFAULT", "default"), ("SVE256", "default")],
)
def test_the_laws_are_run_with_other_instructions(own, other):
    assert elsewhere(own) == other
