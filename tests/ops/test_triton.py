"""The Triton kernel in Triton's interpreter, against batched products, on odd shapes."""

import pytest
import torch

pytest.importorskip("triton")

from cachepress.ops.ragged_attention import triton as kernel
from cachepress.ops.ragged_attention.joint import joint_attention
from cachepress.stores.tail import Tail
from tests.ops.test_ragged_attention import RULES, D, E, G, H, table


def parts_of(counts, n_tail, batch, dtype):
    _, _, _, block = table(counts, 1200, dtype)
    keys = torch.randn(batch, H, n_tail, D).to(dtype)
    return [
        block.part(None),
        Tail.of(keys, torch.randn(batch, H, n_tail, E).to(dtype)).read().part(None),
    ]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("counts", "batch"),
    [([(0, 1, 1200)], 1), ([(70, 70, 70), (70, 70, 70)], 2), ([(3, 64, 1100)], 4)],
    ids=["ragged", "even", "shared"],
)
def test_equals_batched_products(counts, batch, name):
    parts = parts_of(counts, 5, batch, torch.float32)
    query = torch.randn(batch, H, G, 1, D)
    ours = kernel.triton_attention(query, parts, RULES[name])
    wanted = joint_attention(query, parts, RULES[name])
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


def test_half_precision_is_close():
    parts = parts_of([(9, 33, 1030)], 1, 1, torch.bfloat16)
    query = torch.randn(1, H, G, 1, D).bfloat16()
    ours = kernel.triton_attention(query, parts, RULES["plain"])
    wanted = joint_attention(query, parts, RULES["plain"])
    torch.testing.assert_close(ours, wanted, atol=2e-2, rtol=2e-2)


def test_merging_equals_one_softmax():
    logits, values = torch.randn(2, 3, 50), torch.randn(2, 50, 4)
    wanted = logits.softmax(-1) @ values
    pieces = [slice(0, 1), slice(1, 20), slice(20, 50)]
    partials = [
        kernel.Partial(logits[..., p].softmax(-1) @ values[:, p], logits[..., p].logsumexp(-1))
        for p in pieces
    ]
    merged = kernel.merge(partials)
    torch.testing.assert_close(merged.out, wanted)
    torch.testing.assert_close(merged.lse, logits.logsumexp(-1))
