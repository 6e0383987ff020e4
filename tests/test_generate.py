"""transformers' own generate() on compressed caches."""

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache import stores
from tests.tiny import ARCHITECTURES, tiny, tokens
from tests.tiny_cache import forward, kept, pressed

PRESS = cp.KnormPress(0.5)
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def by_hand(model, cache, token, n):
    """Greedy decoding, one forward per token, positions given by hand."""
    out = []
    for _ in range(n):
        position = torch.tensor([[cache.get_seq_length()]])
        logits = forward(model, cache, input_ids=token, position_ids=position).logits
        token = logits[:, -1:].argmax(-1)
        out.append(token.item())
    return out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_continues_from_the_full_text_and_from_new_ids(name):
    model, ids, question = tiny(name), tokens(30), tokens(3, seed=7)
    expected = pressed(model, PRESS, ids)
    forward(model, expected, input_ids=question[:, :-1])
    wanted = by_hand(model, expected, question[:, -1:], 8)
    with torch.no_grad():
        full = torch.cat([ids, question], dim=-1)
        a = model.generate(full, past_key_values=pressed(model, PRESS, ids), **OPTIONS)
        b = model.generate(
            question,
            attention_mask=torch.ones(1, 33, dtype=torch.long),
            past_key_values=pressed(model, PRESS, ids),
            **OPTIONS,
        )
    assert a[0, 33:].tolist() == wanted
    assert b[0, 3:].tolist() == wanted


def test_the_prompt_is_compressed_once():
    model, ids = tiny(), tokens(30)
    with torch.no_grad(), PRESS(model):
        out = model.generate(ids, return_dict_in_generate=True, **OPTIONS)
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    assert stores(cache)[0].lengths.tolist() == [[15 + 7, 15 + 7]]
    assert kept(cache)[0][0][0][-7:] == list(range(30, 37))
    assert out.sequences[0, 30:].tolist()[1:] == by_hand(
        model, pressed(model, PRESS, ids), out.sequences[:, 30:31], 7
    )


def test_sampling_repeats_with_its_seed():
    model, ids = tiny(), tokens(30)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.no_grad(), PRESS(model):
            runs.append(model.generate(ids, **{**OPTIONS, "do_sample": True, "top_k": 20}))
    assert torch.equal(*runs)
    assert runs[0].shape == (1, 38)


def test_beams_follow_their_rows():
    model, ids = tiny(), tokens(30)
    with torch.no_grad():
        plain = model.generate(ids, num_beams=3, **OPTIONS)
        with cp.KnormPress(0.0)(model):
            same = model.generate(ids, num_beams=3, **OPTIONS)
        with PRESS(model):
            ours = model.generate(ids, num_beams=3, **OPTIONS)
    assert torch.equal(same, plain)
    assert ours.shape == (1, 38)


def test_a_padded_batch_generates_like_each_row_alone():
    model, short, long = tiny(), tokens(12, seed=1), tokens(20, seed=2)
    ids = torch.cat([torch.cat([torch.zeros(1, 8, dtype=torch.long), short], -1), long])
    with torch.no_grad(), PRESS(model):
        both = model.generate(ids, attention_mask=(ids > 0).long(), **OPTIONS)
        one = model.generate(short, **OPTIONS)
        two = model.generate(long, **OPTIONS)
    assert both[0, 20:].tolist() == one[0, 12:].tolist()
    assert both[1, 20:].tolist() == two[0, 20:].tolist()


def test_appending_does_not_copy_the_cache():
    model = tiny()
    cache = pressed(model, PRESS, tokens(30))
    store = stores(cache)[0]
    forward(model, cache, input_ids=tokens(1))
    before = [x.data_ptr() for x in store.tensors()]
    for step in range(60):
        forward(model, cache, input_ids=tokens(1, seed=step))
    assert [x.data_ptr() for x in store.tensors()] == before
    assert store.keys.shape[2] == 76


def test_crop_undoes_decoding_but_not_the_settle():
    model, ids = tiny(), tokens(30)
    cache = pressed(model, PRESS, ids)
    once = forward(model, cache, input_ids=tokens(4)).logits
    cache.crop(-4)
    assert cache.get_seq_length() == 30
    assert torch.equal(forward(model, cache, input_ids=tokens(4)).logits, once)
    with pytest.raises(cp.CachepressError, match="cannot crop a compressed cache to 29"):
        cache.crop(-5)


def test_reset_makes_a_cache_new():
    model, ids = tiny(), tokens(30)
    cache = pressed(model, PRESS, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    with PRESS(model):
        forward(model, cache, input_ids=ids)
    assert kept(cache) == kept(pressed(model, PRESS, ids))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fork_as_a_batch_decodes_like_the_original(name):
    model, ids, step = tiny(name), tokens(30), tokens(2, seed=3)
    cache = pressed(model, PRESS, ids)
    forked = cp.fork(cache, 3)
    batch = forward(model, forked, input_ids=step.expand(3, -1)).logits
    assert cache.get_seq_length() == 30
    alone = forward(model, cache, input_ids=step).logits
    for row in batch:
        torch.testing.assert_close(row, alone[0], atol=1e-5, rtol=1e-5)


def test_a_fork_needs_a_number():
    with pytest.raises(cp.CachepressError, match="got n=0"):
        cp.fork(DynamicCache(), 0)
