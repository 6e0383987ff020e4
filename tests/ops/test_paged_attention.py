"""Attention over parts against the specification, on odd shapes."""

import pytest
import torch

from cachepress.cache.masks import TextMask
from cachepress.cache.pairs import Pairs
from cachepress.cache.segment import Segment
from cachepress.cache.snapshot import Snapshot
from cachepress.cache.tail import Tail
from cachepress.ops import AttentionRule
from cachepress.ops.paged_attention import batched
from cachepress.ops.paged_attention.naive import naive_attention
from tests.bounds import close, near
from tests.tiny import rand, randn

H, G, D, E = 3, 2, 8, 6
COUNTS = [(0, 1, 1000), (1000, 31, 32), (33, 64, 0)]
RULES = {
    "plain": AttentionRule(0.5),
    "softcap": AttentionRule(0.7, softcap=2.0),
    "sinks": AttentionRule(0.5, sinks=torch.linspace(-1, 2, H * G, dtype=torch.float64)),
}


def table(counts, n, dtype=torch.float64, seed=0):
    """Random rows in which each head keeps its own number, as a table and as a block."""
    generator = torch.Generator().manual_seed(seed)
    b = len(counts)
    keys = randn(b, H, n, D, generator=generator).to(dtype)
    values = randn(b, H, n, E, generator=generator).to(dtype)
    order = rand(b, H, n, generator=generator).argsort(-1).argsort(-1)
    mask = order < torch.tensor(counts)[..., None]
    return keys, values, mask, Segment.of(Pairs(keys, values), mask)


@pytest.mark.parametrize("n_new", [1, 5])
@pytest.mark.parametrize("name", RULES)
def test_blocks_and_tail_equal_the_specification(name, n_new):
    keys, values, mask, block = table(COUNTS, 1000)
    new_keys, new_values = randn(3, H, n_new, D), randn(3, H, n_new, E)
    held = Snapshot((block,), Tail.of(new_keys, new_values).read(), 1000 + n_new, 3, None)
    query = randn(3, H * G, n_new, D)
    ours = held.attend(query, TextMask(None, n_new), RULES[name]).transpose(1, 2)
    for q in range(n_new):
        rows = [
            [
                (
                    torch.cat([keys[b, h][mask[b, h]], new_keys[b, h, : q + 1]]),
                    torch.cat([values[b, h][mask[b, h]], new_values[b, h, : q + 1]]),
                )
                for h in range(H)
            ]
            for b in range(3)
        ]
        wanted = naive_attention(
            query.view(3, H, G, n_new, D)[..., q : q + 1, :], rows, RULES[name]
        )
        close(ours[:, :, q], wanted.view(3, H * G, E))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[(5, 1, 1000)], [(7, 7, 7)], [(64, 64, 64), (64, 64, 64)]])
def test_equals_masked_dense_attention(counts, dtype):
    keys, values, mask, block = table(counts, 1000, dtype)
    b = len(counts)
    held = Snapshot((block,), None, 1000, b, None)
    query = randn(b, H * G, 1, D).to(dtype)
    ours = held.attend(query, TextMask(None, 1), AttentionRule(D**-0.5)).transpose(1, 2)
    k, v, m = (x.repeat_interleave(G, dim=1) for x in (keys, values, mask.unsqueeze(2)))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.double(), k.double(), v.double(), attn_mask=m
    )
    assert ours.dtype == dtype
    if dtype == torch.float64:
        close(ours, wanted)
    elif dtype == torch.float32:
        near(ours, wanted, dtype, terms=D + 2 * max(max(row) for row in counts))
    else:  # Half types are multiplied in float32, and only the result is rounded.
        near(ours, wanted, dtype, terms=2)


def test_rows_that_are_shared_equal_rows_that_are_copied():
    _, _, _, block = table([(3, 40, 0)], 50)
    tail = Tail.of(randn(4, H, 2, D), randn(4, H, 2, E)).read()
    query = randn(4, H * G, 2, D)
    copied = block.select(torch.zeros(4, dtype=torch.long))
    mask = torch.ones(4, 52, dtype=torch.long)
    mask[2, 3:9] = 0
    for text in (TextMask(None, 2), TextMask(mask, 2)):
        shared, own = (
            Snapshot((rows,), tail, 52, 4, None).attend(query, text, AttentionRule(0.4))
            for rows in (block, copied)
        )
        close(shared, own)


def test_a_mask_hides_the_rows_of_its_columns():
    keys, values, kept, block = table([(9, 40, 21)], 50)
    hidden = torch.zeros(1, 50, dtype=torch.bool)
    hidden[0, ::3] = True
    tail = Tail.of(randn(1, H, 1, D), randn(1, H, 1, E)).read()
    mask = torch.cat([~hidden, torch.ones(1, 1, dtype=torch.bool)], dim=1)
    query = randn(1, H * G, 1, D)
    held = Snapshot((block,), tail, 51, 1, None)
    ours = held.attend(query, TextMask(mask.long(), 1), AttentionRule(0.4))
    fewer = Segment.of(Pairs(keys, values), kept & ~hidden)
    wanted = Snapshot((fewer,), tail, 51, 1, None).attend(
        query, TextMask(None, 1), AttentionRule(0.4)
    )
    close(ours, wanted)


def test_many_queries_are_taken_in_turns(monkeypatch):
    _, _, _, block = table([(9, 40, 21)], 50)
    tail = Tail.of(randn(1, H, 30, D), randn(1, H, 30, E)).read()
    held = Snapshot((block,), tail, 80, 1, None)
    query = randn(1, H * G, 30, D)
    whole = held.attend(query, TextMask(None, 30), AttentionRule(0.4))
    monkeypatch.setattr(batched, "LOGITS", 64 * H * G * 7)
    parts = held.attend(query, TextMask(None, 30), AttentionRule(0.4))
    close(parts, whole)
