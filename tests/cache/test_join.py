"""Caches of different presses, joined into one batch: every sequence is as if alone."""

import pytest
import torch

import cachepress as cp
from cachepress.cache.joined import form_of, join
from cachepress.generation.answering import Forced, force, generate
from tests.bounds import close
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokenizer, tokens
from tests.tiny_cache import forward

IDS = tokens(150, seed=3)
QUESTIONS = [tokens(5, seed=1), tokens(9, seed=2)]


@pytest.fixture(scope="module")
def model():
    return tiny()


def prefilled(model, press, storage="full"):
    return cp.prefill(model, IDS, press, storage=storage)


SETS = {
    "even heads": ([cp.KnormPress(0.5), cp.SnapKVPress(0.5), cp.KeyDiffPress(0.5)], "full"),
    "uneven heads": (
        [cp.AdaKVPress(cp.KnormPress(0.2)), cp.AdaKVPress(cp.SnapKVPress(0.9))],
        "full",
    ),
    "quantized": ([cp.KnormPress(0.5), cp.AdaKVPress(cp.KnormPress(0.25))], "int4"),
    "channels": ([cp.ThinKPress(0.5), cp.ThinKPress(0.5, window_size=16)], "full"),
    "pages": (
        [cp.QuestPress(cp.KnormPress(0.3), pages=2), cp.QuestPress(cp.KnormPress(0.1), pages=2)],
        "full",
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_joined_batch_continues_every_cache(model, name):
    presses, storage = SETS[name]
    caches = [prefilled(model, press, storage) for press in presses]
    assert len({form_of(cache) for cache in caches}) == 1
    joined = join([caches], 2)
    new = torch.cat([tokens(3, seed=i) for i in range(2 * len(presses))])
    for step in range(3):
        got = forward(model, joined, input_ids=new[:, step : step + 1]).logits
        for i, row in enumerate(got):
            if not step and i < len(presses):
                continue
            alone = cp.fork(caches[i % len(presses)])
            wanted = forward(model, alone, input_ids=new[i : i + 1, : step + 1]).logits
            if name != "pages":  # A forward of several tokens reads every page.
                close(row[-1], wanted[0, -1])


def test_pages_of_a_joined_batch_are_chosen_for_each_sequence(model):
    presses, _ = SETS["pages"]
    caches = [prefilled(model, press) for press in presses]
    token = tokens(4, seed=7).view(4, 1)
    got = forward(model, join([caches], 2), input_ids=token).logits
    for i, row in enumerate(got):
        wanted = forward(model, cp.fork(caches[i % 2]), input_ids=token[i : i + 1]).logits[0]
        close(row, wanted)


def test_a_joined_cache_holds_each_row_once_and_can_be_reordered(model):
    caches = [prefilled(model, press) for press in (cp.SnapKVPress(0.5), cp.KnormPress(0.5))]
    joined = join([caches], 3)
    held = [cp.size_of(cache).pairs_held for cache in caches]
    assert cp.size_of(joined).pairs_held == 3 * sum(held)
    own = [cp.size_of(cache).bytes_after for cache in caches]
    assert sum(own) * 0.95 < cp.size_of(joined).bytes_after < sum(own) * 1.1
    joined.reorder_cache(torch.tensor([5, 0]))
    token = tokens(2, seed=7).view(2, 1)
    got = forward(model, joined, input_ids=token).logits
    for row, cache, own_token in zip(got, reversed(caches), token, strict=True):
        wanted = forward(model, cp.fork(cache), input_ids=own_token[None]).logits[0]
        close(row, wanted)


GROUPS = [
    [cp.KnormPress(0.0)],
    [cp.KnormPress(0.5), cp.SnapKVPress(0.5)],
    [cp.AdaKVPress(cp.SnapKVPress(0.9)), cp.AdaKVPress(cp.KnormPress(0.4))],
    [cp.ThinKPress(0.5)],
]


def test_groups_of_any_form_are_one_batch(model):
    groups = [[prefilled(model, press) for press in group] for group in GROUPS]
    joined = join(groups, 2)
    order = [cache for group in groups for _ in range(2) for cache in group]
    every = [ids for group in groups for ids in QUESTIONS for _ in group]
    held = [cp.size_of(cache).pairs_held for cache in order]
    assert cp.size_of(joined).pairs_held == sum(held)
    got = generate(model, tokenizer(), joined, every, 8, {}).tokens
    for answer, cache, question in zip(got, order, every, strict=True):
        alone = generate(model, tokenizer(), cp.fork(cache), [question], 8, {})
        assert answer == alone.tokens[0]
    with pytest.raises(cp.UnsupportedError, match="can be decoded from, and nothing else"):
        joined.reorder_cache(torch.tensor([0]))


def test_forced_texts_are_expected_as_in_one_forward(model):
    texts = [Forced(QUESTIONS[0], [4, 5, 6]), Forced(QUESTIONS[1], [])]
    got = force(model, cp.fork(prefilled(model, None), 2), texts)
    for text, found in zip(texts, got, strict=True):
        answer = torch.tensor([list(text.answer)], dtype=torch.long)
        ids = torch.cat([IDS, text.question_ids, answer], dim=1)
        wanted = forward(model, input_ids=ids).logits[0, -len(text.answer) - 1 :]
        close(found, wanted.log_softmax(-1))


def test_what_cannot_be_joined_is_refused(model):
    whole, pressed = prefilled(model, None), prefilled(model, cp.KnormPress(0.5))
    assert form_of(whole) is None
    with pytest.raises(cp.CachepressError, match="join: got groups of 2 forms"):
        join([[whole, pressed]])
    with pytest.raises(cp.CachepressError, match="of 2 forms"):
        join([[pressed, prefilled(model, cp.KnormPress(0.5), "int8")]])
    with pytest.raises(cp.CachepressError, match="in one group only"):
        join([[pressed], [prefilled(model, cp.KnormPress(0.5), "int8")]])
    with pytest.raises(cp.CachepressError, match="groups of 1, 1 forms, texts of 90, 150 tokens"):
        join([[pressed], [cp.prefill(model, IDS[:, :90], cp.KnormPress(0.5))]])
    with pytest.raises(cp.CachepressError, match="n=0, wanted"):
        join([[pressed]], 0)
