"""The Triton kernel in Triton's interpreter, against batched products, on odd shapes."""

import pytest
import torch

pytest.importorskip("triton")

from cachepress.cache.pairs import Pairs
from cachepress.cache.segment import Segment
from cachepress.cache.tail import Tail
from cachepress.ops.paged_attention import triton as kernel
from cachepress.ops.paged_attention.batched import batched_attention
from tests.bounds import close, near
from tests.ops.test_paged_attention import RULES, D, E, G, H, table
from tests.tiny import randn

TERMS = D + 2 * 1205
"""The kernel sums in float32: a product of a query and a key, a softmax and its values."""


def parts_of(counts, n_tail, batch, dtype):
    """Random parts in a type, and the same numbers in float64."""
    keys, values, mask, _ = table(counts, 1200, dtype)
    tail = [randn(batch, H, n_tail, size).to(dtype) for size in (D, E)]
    return [
        [
            Segment.of(Pairs(keys.to(kind), values.to(kind)), mask).part(None),
            Tail.of(*(x.to(kind) for x in tail)).read().part(None),
        ]
        for kind in (dtype, torch.float64)
    ]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("counts", "batch"),
    [([(0, 1, 1200)], 1), ([(70, 70, 70), (70, 70, 70)], 2), ([(3, 64, 1100)], 4)],
    ids=["ragged", "even", "shared"],
)
def test_equals_batched_products(counts, batch, name):
    parts, exact = parts_of(counts, 5, batch, torch.float32)
    query = randn(batch, H, G, 1, D).float()
    ours = kernel.triton_attention(query, parts, RULES[name])
    near(ours, batched_attention(query.double(), exact, RULES[name]), torch.float32, TERMS)


def test_half_types_are_summed_in_float32():
    parts, exact = parts_of([(9, 33, 1030)], 1, 1, torch.bfloat16)
    query = randn(1, H, G, 1, D).bfloat16()
    ours = kernel.triton_attention(query, parts, RULES["plain"])
    near(ours, batched_attention(query.double(), exact, RULES["plain"]), torch.float32, TERMS)


def test_merging_equals_one_softmax():
    logits, values = randn(2, 3, 50), randn(2, 50, 4)
    wanted = logits.softmax(-1) @ values
    pieces = [slice(0, 1), slice(1, 20), slice(20, 50)]
    partials = [
        kernel.Partial(logits[..., p].softmax(-1) @ values[:, p], logits[..., p].logsumexp(-1))
        for p in pieces
    ]
    merged = kernel.merge(partials)
    close(merged.out, wanted)
    close(merged.lse, logits.logsumexp(-1))
