"""Gradients through a cache: those of the same forwards, or one line in ``backward()``."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.hf import cache_argument
from cachepress.press import with_inner
from tests.bounds import close, rounding
from tests.dense import dense_logits, mask_and_positions
from tests.laws.test_matrix import QUESTION, batch, build, of_each
from tests.tiny import ARCHITECTURES, exact_tiny, tokens

STEPS = (20, 3, 1, 1)
"""Tokens of the forwards after the text: laid out for the model's function, and read in place."""
IN_PLACE = ("qwen3_next",)
"""Architectures whose own recurrent states are written to in place, so that backward fails."""
LOST = {"MergingPress", "CAMPress", "KIVIPress"}
"""Wrappers through whose kept pairs there is no gradient."""


def logits_after(model, press, ids, mask=None, storage="full", steps=STEPS):
    """Logits of forwards that follow a compressed text, with gradients recorded in all of them."""
    cache, name, seen = DynamicCache(config=model.config), cache_argument(model), ids.shape[1]
    given = {name: cache}
    if press is None:
        model(ids, **given, **mask_and_positions(mask, 0, seen))
    else:
        with press(model, storage=storage, question=QUESTION):
            model(ids, **given, **mask_and_positions(mask, 0, seen))
    found = []
    for seed, n in enumerate(steps):
        if mask is not None:
            mask = torch.cat([mask, torch.ones(len(ids), n, dtype=torch.long)], dim=1)
        step = tokens(n, batch=len(ids), seed=seed)
        found.append(model(step, **given, **mask_and_positions(mask, seen, n)).logits)
        seen += n
    return torch.cat(found, dim=1)


def gradients(model, logits):
    model.zero_grad()
    logits.square().mean().backward()
    return {
        k: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for k, p in model.named_parameters()
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("company", ["alone", "padded"])
@pytest.mark.parametrize("name", [x for x in ARCHITECTURES if x not in IN_PLACE])
def test_at_ratio_0_they_are_those_of_transformers_own_cache(name, company, attention):
    model = exact_tiny(name)
    if attention == "eager" or model._supports_sdpa:
        model.set_attn_implementation(attention)
    _, ids, mask = batch(company)
    wanted = gradients(model, logits_after(model, None, ids, mask))
    ours = gradients(model, logits_after(model, cp.KnormPress(0.0), ids, mask))
    for k in wanted:
        close(ours[k], wanted[k])
    assert any(bool(x.any()) for k, x in wanted.items() if "k_proj" in k or "attn" in k)


def moved(model, direction, by, value):
    """``value()`` with all weights moved along a direction."""
    with torch.no_grad():
        for weight, step in zip(model.parameters(), direction, strict=True):
            weight += by * step
        found = float(value())
        for weight, step in zip(model.parameters(), direction, strict=True):
            weight -= by * step
    return found


def difference(model, value, direction, by):
    return (moved(model, direction, by, value) - moved(model, direction, -by, value)) / (2 * by)


def check_against_differences(model, value):
    """Compare the gradient with central differences, along one direction of all weights.

    Their error is a third of what they change by when the step is doubled, and rounding: that of
    the value, over the step, which is so small that no choice of pairs changes within it.
    """
    torch.manual_seed(0)
    direction = [torch.randn_like(p) for p in model.parameters()]
    model.zero_grad()
    value().backward()
    pairs = zip(model.parameters(), direction, strict=True)
    ours = float(sum((p.grad * step).sum() for p, step in pairs if p.grad is not None))
    by = 1e-8
    near, far = (difference(model, value, direction, x) for x in (by, 2 * by))
    bound = abs(near - far) + rounding(torch.float64, terms=100, depth=4) / by
    assert abs(ours - near) <= bound, (ours, near, far)
    assert bound < 1e-3 * abs(near)


@of_each
def test_they_are_those_of_finite_differences(scorer, wrapper):
    model, press = exact_tiny(), build(scorer, wrapper)
    _, ids, mask = batch("padded" if len(scorer) % 2 else "alone")
    if any(p.learned for p in with_inner(press)):
        pytest.skip("what it learned is of these very weights")

    def value():
        return logits_after(model, press, ids, mask).square().mean()

    if wrapper in LOST:
        with pytest.raises(cp.CachepressError, match="there is no gradient through") as caught:
            value().backward()
        assert "\n" not in str(caught.value)
    else:
        check_against_differences(model, value)


@pytest.mark.parametrize("storage", [cp.Codec(4, residual=5), cp.Codec(8, residual=5)])
@pytest.mark.parametrize("press", [cp.KnormPress(0.5), cp.AdaKVPress(cp.SnapKVPress(0.0))])
def test_none_goes_through_rounded_pairs_and_all_else_is_right(press, storage):
    model, ids = exact_tiny(), tokens(90)
    loss = logits_after(model, press, ids, storage=storage).square().mean()
    with pytest.raises(cp.CachepressError, match=r"rounded to int\d: .*torch\.no_grad"):
        loss.backward()
    with torch.no_grad():
        cache = cp.prefill(model, ids, press, storage=storage)
    name = cache_argument(model)

    def value():
        return model(tokens(20, seed=1), **{name: cp.fork(cache)}).logits.square().mean()

    check_against_differences(model, value)


PRESSES = {
    "even": cp.KnormPress(0.5),
    "uneven": cp.AdaKVPress(cp.KnormPress(0.5)),
    "whole": cp.KnormPress(0.0),
    "across layers": cp.AdaKVPress(cp.SnapKVPress(0.6, window_size=4), scope="model"),
}


@pytest.mark.parametrize("n", [1, 5, 20])
@pytest.mark.parametrize("company", ["alone", "padded"])
@pytest.mark.parametrize("press", PRESSES)
def test_a_soft_prompt_learns_as_from_a_masked_whole_cache(press, company, n):
    """The text is read without gradients; the question alone has them."""
    model = exact_tiny()
    _, ids, mask = batch(company)
    question, name = tokens(n, batch=len(ids), seed=7), cache_argument(model)
    cache = cp.prefill(model, ids, PRESSES[press], attention_mask=mask)
    embeds = model.get_input_embeddings()(question).detach()
    ours, wanted = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    longer = None if mask is None else torch.cat([mask, torch.ones_like(question)], dim=1)
    given = {name: cp.fork(cache), **mask_and_positions(longer, ids.shape[1], n)}
    model(inputs_embeds=ours, **given).logits.sum().backward()
    dense_logits(model, cache, ids, question, mask, wanted)[1].sum().backward()
    close(ours.grad, wanted.grad)


@pytest.mark.parametrize("company", ["alone", "padded"])
@pytest.mark.parametrize("press", PRESSES)
def test_weights_learn_as_from_a_masked_whole_cache(press, company):
    model = exact_tiny()
    _, ids, mask = batch(company)
    question, seen = tokens(5, batch=len(ids), seed=7), ids.shape[1]
    cache, name = DynamicCache(), cache_argument(model)
    with PRESSES[press](model):
        model(ids, **{name: cache}, **mask_and_positions(mask, 0, seen))
    held = cp.fork(cache)
    longer = None if mask is None else torch.cat([mask, torch.ones_like(question)], dim=1)
    ours = gradients(
        model, model(question, **{name: cache}, **mask_and_positions(longer, seen, 5)).logits
    )
    reference, logits = dense_logits(model, held, ids, question, mask)
    wanted = gradients(reference, logits)
    for k in wanted:
        close(ours[k], wanted[k])


@pytest.mark.parametrize("learning", ["all", "q_proj", "v_proj", "k_proj"])
@pytest.mark.parametrize("company", ["alone", "padded"])
@pytest.mark.parametrize("seed", range(2))
def test_forwards_with_and_without_gradients_may_alternate(company, learning, seed):
    """As in transformers' own cache, a forward without gradients ends the graph of what is held."""
    _, ids, mask = batch(company)
    draws = torch.Generator().manual_seed(seed)
    steps = [(n, bool(torch.rand(1, generator=draws) < 0.7)) for n in (1, 1, 3, 1, 17, 1, 1)]

    def run(press):
        model, given = exact_tiny(), mask
        for name, weight in model.named_parameters():
            weight.requires_grad_(learning == "all" or learning in name)
        cache, seen, total = DynamicCache(), ids.shape[1], 0
        argument = {cache_argument(model): cache}
        if press is None:
            model(ids, **argument, **mask_and_positions(given, 0, seen))
        else:
            with press(model):
                model(ids, **argument, **mask_and_positions(given, 0, seen))
        for place, (n, learns) in enumerate(steps):
            if given is not None:
                given = torch.cat([given, torch.ones(len(ids), n, dtype=torch.long)], dim=1)
            step = tokens(n, batch=len(ids), seed=place)
            with torch.set_grad_enabled(learns):
                out = model(step, **argument, **mask_and_positions(given, seen, n)).logits
            total, seen = total + out.square().mean(), seen + n
        total.backward()
        return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}

    ours, wanted = run(cp.KnormPress(0.0)), run(None)
    assert ours.keys() == wanted.keys()
    for k in wanted:
        close(ours[k], wanted[k])


@pytest.mark.parametrize("press", PRESSES)
def test_without_gradients_nothing_is_held_for_them(press):
    model, ids = exact_tiny(), tokens(60)
    name, caches = cache_argument(model), []
    for learns in (True, False):
        cache = DynamicCache()
        with torch.set_grad_enabled(learns), PRESSES[press](model):
            model(ids, **{name: cache})
        with torch.no_grad():
            for seed in range(3):
                model(tokens(1, seed=seed), **{name: cache})
        caches.append(compressed_layers(cache))
    for ours, wanted in zip(*caches, strict=True):
        assert not any(x.requires_grad for x in ours.tensors())
        assert ours.nbytes == wanted.nbytes


@pytest.mark.parametrize("press", PRESSES)
@pytest.mark.parametrize("company", ["alone", "padded"])
def test_a_cache_that_was_filled_in_inference_mode_is_trained_on(press, company):
    model = exact_tiny()
    _, ids, mask = batch(company)
    question, name, n = tokens(4, batch=len(ids), seed=7), cache_argument(model), ids.shape[1]
    longer = None if mask is None else torch.cat([mask, torch.ones_like(question)], dim=1)
    found = []
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            cache = cp.prefill(model, ids, PRESSES[press], attention_mask=mask)
            cache = cp.fork(cache)
            cache.reorder_cache(torch.arange(len(ids)))
        given = {name: cache, **mask_and_positions(longer, n, 4)}
        found.append(gradients(model, model(question, **given).logits))
    for k in found[0]:
        close(found[0][k], found[1][k])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_is_right_or_refused(reentrant):
    model, ids, question = exact_tiny(), tokens(40), tokens(6, seed=7)
    cache, name = cp.prefill(model, ids, cp.KnormPress(0.5)), cache_argument(model)
    embeds = model.get_input_embeddings()(question).detach()

    def after(held):
        return lambda x: model(inputs_embeds=x, **{name: held()}).logits

    def learned(held, again):
        soft = embeds.clone().requires_grad_()
        run = after(held)
        out = checkpoint(run, soft, use_reentrant=reentrant) if again else run(soft)
        out.sum().backward()
        return soft.grad

    wanted = learned(lambda: cp.fork(cache), False)
    close(learned(lambda: cp.fork(cache), True), wanted)
    held = cp.fork(cache)
    with pytest.raises(cp.CachepressError, match=r"repeated in backward.*fork") as caught:
        learned(lambda: held, True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_of_a_pressed_model_is_right(reentrant):
    model, question = exact_tiny(), tokens(30, seed=7)
    embeds = model.get_input_embeddings()(question).detach()

    def learned(again):
        soft = embeds.clone().requires_grad_()

        def run(x):
            return model(inputs_embeds=x, use_cache=True).logits

        with cp.KnormPress(0.5)(model):
            out = checkpoint(run, soft, use_reentrant=reentrant) if again else run(soft)
            out.sum().backward()
        return soft.grad

    close(learned(True), learned(False))


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("press", [None, cp.KnormPress(0.5)])
def test_transformers_checkpointing_drops_no_cache_in_silence(press, n):
    """It runs the layers of a model in training without the cache that the model was given."""
    model, question = exact_tiny(), tokens(n, seed=7)
    cache, name = cp.prefill(model, tokens(40), cp.KnormPress(0.5)), cache_argument(model)
    wanted = gradients(model, model(question, **{name: cp.fork(cache)}).logits)
    model.train()
    model.gradient_checkpointing_enable()
    with nullcontext() if press is None else press(model, turns="first"):
        with pytest.raises(cp.UnsupportedError, match="without its cache.*checkpointing") as caught:
            model(question, **{name: cp.fork(cache)})
        assert "\n" not in str(caught.value)
        model(question).logits.sum().backward()
    model.gradient_checkpointing_disable()
    ours = gradients(model, model(question, **{name: cp.fork(cache)}).logits)
    for k in wanted:
        close(ours[k], wanted[k])
