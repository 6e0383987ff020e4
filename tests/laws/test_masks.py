"""What a query sees, whichever way its mask is given: its text up to itself, and no padding."""

import pytest
import torch

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.cache.masks import TextMask
from cachepress.hf.attention import _mask_of_pairs
from cachepress.ops import AttentionRule
from cachepress.ops.paged_attention.naive import naive_attention
from tests.bounds import close
from tests.tiny import exact_tiny, randn, tokens
from tests.tiny_cache import forward

LONG, RULE = 41, AttentionRule(0.3)
PRESSES = {
    "even": cp.KnormPress(0.5),
    "uneven": cp.AdaKVPress(cp.KnormPress(0.5)),
    "in few bits": cp.KIVIPress(cp.KnormPress(0.5), residual=5),
    "whole": cp.KnormPress(0.0),
}
DECODED = {"settled": (), "one": (3,), "several": (1, 7, 20), "many": (1,) * 40}
PADDED = 13


def store_of(press, decoded, padded=False):
    """A layer's pairs, of two texts, with tails of every kind; and which columns are tokens."""
    ids, valid = tokens(LONG, batch=2), torch.ones(2, LONG, dtype=torch.bool)
    valid[1, :PADDED] = not padded
    store = compressed_layers(
        cp.prefill(exact_tiny(), ids, press, attention_mask=valid.long() if padded else None)
    )[1]
    for n in decoded:
        store.update(randn(2, 2, n, 8), randn(2, 2, n, 8))
    return store, torch.cat([valid, torch.ones(2, sum(decoded), dtype=torch.bool)], dim=1)


def masks(valid, n, padded):
    """The mask of ``n`` queries as every attention function is given it."""
    seen = valid.shape[1]
    causal = torch.arange(seen) <= torch.arange(seen - n, seen)[:, None]
    visible = valid[:, None, None] & causal
    added = torch.zeros(visible.shape, dtype=torch.float64)
    given = {
        "bool": visible,
        "added": added.masked_fill(~visible, torch.finfo(torch.float64).min),
        "of each head": visible.expand(-1, 4, -1, -1),
        "of columns": valid.long(),
    }
    return given if padded else {"none": None, **given}


def visible_rows(store, valid, n):
    """Which pairs each query may see, from the positions alone, ``[B, H, n, T]``."""
    position = store.positions[:, :, None].long()
    query = torch.arange(store.get_seq_length() - n, store.get_seq_length())[:, None]
    token = valid[:, None].expand(-1, 2, -1).gather(-1, position[:, :, 0].clamp(min=0))
    return (position >= 0) & (position <= query) & token[:, :, None]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("decoded", DECODED)
@pytest.mark.parametrize("press", PRESSES)
def test_a_query_sees_its_text_up_to_itself(press, decoded, padded):
    store, valid = store_of(PRESSES[press], DECODED[decoded], padded)
    for n in (1, 2, 7, 20):
        new = randn(2, 2, n, 8), randn(2, 2, n, 8)
        store.update(*new)
        valid = torch.cat([valid, torch.ones(2, n, dtype=torch.bool)], dim=1)
        held, query = store.snapshot, randn(2, 4, n, 8)
        rows, visible = held.rows(), visible_rows(store, valid, n)
        wanted = torch.stack([of_query(query[:, :, i], rows, visible[:, :, i]) for i in range(n)])
        for given in masks(valid, n, padded).values():
            mask = TextMask(given, n)
            bias = _mask_of_pairs(mask, held, rows, query) if rows.positions is not None else None
            if bias is not None:
                shown = (bias == 0).expand(2, 4, n, -1)
                assert torch.equal(shown, visible.repeat_interleave(2, dim=1))
            if not mask.per_head:
                close(held.attend(query, mask, RULE).transpose(0, 1), wanted)


def of_query(query, rows, visible):
    """Attention of one query of every sequence, ``[B, H * G, E]``, over the pairs that it sees."""
    seen = [
        [(rows.keys[b, h][visible[b, h]], rows.values[b, h][visible[b, h]]) for h in range(2)]
        for b in range(2)
    ]
    return naive_attention(query.view(2, 2, 2, 1, 8), seen, RULE).view(2, 4, 8)


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_was_written_to_is_read_again(inference):
    """Also one and the same tensor, which a caller fills anew for every forward."""
    model, ids, step = exact_tiny(), tokens(LONG), tokens(2, seed=1)
    press = cp.StreamingLLMPress(0.5, n_sink=4)
    place = torch.tensor([[LONG, LONG + 1]])

    def answer(mask):
        cache = cp.fork(compressed)
        return forward(model, cache, input_ids=step, attention_mask=mask, position_ids=place).logits

    with torch.inference_mode(inference):
        compressed = cp.prefill(model, ids, press)
        mask = torch.zeros(1, 1, 2, LONG + 2, dtype=torch.float64)
        mask[..., 0, -1] = torch.finfo(torch.float64).min
        whole = answer(mask)
        mask[..., LONG - 9 : LONG - 2] = torch.finfo(torch.float64).min
        ours, wanted = answer(mask), answer(mask.clone())
        close(ours, wanted)
        assert (ours - whole).abs().max() > 0.1


@pytest.mark.parametrize("n", [1, 2, 7, 20])
@pytest.mark.parametrize("older", [0, 1, 30])
def test_no_mask_is_that_of_every_column(n, older):
    """Where a model passes no mask, columns that are all tokens say the same."""
    for start in range(older + 1):
        none, columns = TextMask(None, n), TextMask(torch.ones(1, older + n).long(), n)
        ours = none.of_columns(start, older + n, torch.device("cpu"))
        wanted = columns.of_columns(start, older + n, torch.device("cpu"))
        if ours is None:
            assert n == 1 and not wanted.any()
        else:
            assert torch.equal(ours, wanted)
    assert none.valid is None and columns.valid is None and none.of_rows(older, None) is None
