"""Grouped attention sums against a slow reference that repeats keys."""

import pytest
import torch

from cachepress.ops import (
    AttentionRule,
    attention,
    attention_column_peaks,
    attention_column_sums,
    attention_weights,
)
from tests.bounds import close, near
from tests.tiny import randn

B, H, G, Q, T, D = 2, 2, 3, 5, 11, 4


def reference(queries, keys, valid, rule):
    weights = torch.zeros(B, H, G, queries.shape[3], T, dtype=torch.float64)
    for b, h, g in torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(G)):
        for i, query in enumerate(queries[b, h, g]):
            logits = keys[b, h] @ query * rule.scaling
            if rule.softcap:
                logits = rule.softcap * torch.tanh(logits / rule.softcap)
            row = T - queries.shape[3] + i
            seen = [t for t in range(row + 1) if valid[b, h, t]]
            terms = logits[seen].exp()
            total = terms.sum() + (rule.sinks[h * G + g].exp() if rule.sinks is not None else 0)
            weights[b, h, g, i, seen] = terms / total
    return weights


RULES = {
    "plain": AttentionRule(0.5),
    "softcap": AttentionRule(0.7, softcap=2.0),
    "sinks": AttentionRule(0.5, sinks=randn(6)),
}


def case(dtype=torch.float64):
    """Queries, keys and valid rows, with padding in front of the second sequence."""
    torch.manual_seed(0)
    queries, keys = randn(B, H, G, T, D), randn(B, H, T, D)
    valid = torch.ones(B, H, T, dtype=torch.bool)
    valid[1, :, :3] = False
    return queries.to(dtype), keys.to(dtype), valid


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("memory", [1, 1000, 4000, 1 << 24])
@pytest.mark.parametrize("last", [T, Q])
def test_sums_and_peaks_over_all_and_over_the_last_queries(last, memory, name, monkeypatch):
    monkeypatch.setattr(attention, "_BYTES", memory)
    queries, keys, valid = case()
    whole = reference(queries, keys, valid, RULES[name])[..., -last:, :]
    votes = torch.linspace(0.5, 2, last, dtype=torch.float64) * valid[:, 0, -last:]
    counted = whole.nan_to_num() * votes[:, None, None, :, None]
    inputs = queries[..., -last:, :], keys, valid, votes, RULES[name]
    for block in (None, 1, 4):
        close(attention_column_sums(*inputs, block), counted.sum(-2))
        close(attention_column_peaks(*inputs, block), counted.amax(-2))
        some = slice(3, T - 2)
        close(attention_column_peaks(*inputs, block, some), counted.amax(-2)[..., some])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("memory", [1, 1000, 1 << 24])
def test_weights_come_in_blocks(memory, name, monkeypatch):
    monkeypatch.setattr(attention, "_BYTES", memory)
    queries, keys, valid = case()
    whole = reference(queries, keys, valid, RULES[name])
    for last in (T, Q):
        for block in (None, 1, 4):
            found = attention_weights(queries[..., -last:, :], keys, valid, RULES[name], block)
            for some, weights in found:
                seen, part = weights.shape[-1], whole[..., -last:, :][..., some, :]
                assert not part[..., seen:].any()
                real = valid[:, :, None, -last:, None][..., some, :].expand_as(weights)
                close(weights[real], part[..., :seen][real])


def test_where_every_row_is_valid_none_need_be_named():
    queries, keys, valid = case()
    valid = torch.ones_like(valid)
    votes = valid[:, 0]
    wanted = attention_column_sums(queries, keys, valid, votes, RULES["plain"])
    found = attention_column_sums(queries, keys, None, votes, RULES["plain"])
    assert torch.equal(found, wanted)
    for (_, ours), (_, theirs) in zip(
        attention_weights(queries, keys, None, RULES["plain"], 4),
        attention_weights(queries, keys, valid, RULES["plain"], 4),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_softmax_is_taken_in_float32(dtype):
    """Each row sums up to the queries that count, which halves could not count beyond 256."""
    queries, keys, valid = case(dtype)
    queries = queries.repeat(1, 1, 1, 60, 1)
    keys, valid = (x.repeat_interleave(60, 2) for x in (keys, valid))
    sums = attention_column_sums(queries, keys, valid, valid[:, 0], RULES["plain"])
    assert sums.dtype == torch.float32
    wanted = valid[:, 0].sum(-1)[:, None, None].expand(B, H, G)
    near(sums.sum(-1), wanted, torch.float32, keys.shape[2])


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("length", [8192, 65536])
def test_blocks_fit_into_the_memory_that_is_set_aside(length, batch):
    queries = torch.empty(batch, 8, 4, length, 128, device="meta")
    keys = torch.empty(batch, 8, length, 128, device="meta")
    blocks = list(attention._blocks(queries, keys, None))
    n = 0
    for sequences, heads, some, end in blocks:
        lengths = [len(range(*x.indices(10**9))) for x in (sequences, heads, some)]
        n += lengths[0] * lengths[1] * lengths[2]
        assert lengths[0] * lengths[1] * lengths[2] * 4 * end * 4 <= 2**24
        assert lengths[2] >= 16
        assert end == some.stop
    assert n == batch * 8 * length
