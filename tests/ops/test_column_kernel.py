"""The kernel of attention sums in Triton's interpreter, against blocks of weights."""

import pytest
import torch

pytest.importorskip("triton")

from cachepress.ops import AttentionRule, attention_column_peaks, attention_column_sums
from cachepress.ops.column_kernel import Attention
from tests.bounds import near
from tests.tiny import randn

SHAPES = [
    (1, 1, 2, 140, 140, 16),
    (2, 2, 1, 70, 201, 24),
    (1, 2, 1, 1, 67, 8),
    (1, 1, 1, 3, 1100, 130),
]
RULES = {
    "plain": AttentionRule(0.3),
    "softcap": AttentionRule(0.3, softcap=2.0),
    "sinks": AttentionRule(0.3, sinks=torch.linspace(-1, 2, 4, dtype=torch.float64)),
}


def case(shape, dtype, padded):
    """Queries, keys, valid rows and votes in a half type, queries laid out as a model does."""
    b, h, g, q, t, d = shape
    queries = randn(b, q, h * g, d).to(dtype).transpose(1, 2).view(b, h, g, q, d)
    keys, votes = randn(b, h, t, d).to(dtype), torch.linspace(0.5, 2, q).expand(b, q)
    if not padded:
        return queries, keys, None, votes
    valid = torch.rand(b, h, t, generator=torch.Generator().manual_seed(0)) > 0.3
    own = torch.arange(q) % 3 > 0
    valid[..., -q:] = own | (valid[..., -q:] & (q == 1))
    keys = keys.masked_fill(~valid.unsqueeze(-1), torch.nan)  # What is not valid is not read.
    return queries, keys, valid, votes * (own if q > 1 else 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_blocks_of_weights(shape, name, padded):
    dtype = torch.bfloat16 if shape[3] > 1 else torch.float16
    queries, keys, valid, votes = case(shape, dtype, padded)
    rule = RULES[name]
    if rule.sinks is not None:
        rule = AttentionRule(rule.scaling, sinks=rule.sinks[: shape[1] * shape[2]])
    exact = keys.double().nan_to_num() if padded else keys.double()
    inputs = queries.double(), exact, valid, votes.double(), rule
    ours, terms = Attention(queries, keys, valid, rule), shape[5] + 2 * shape[4] + shape[3]
    for some in (slice(None), slice(5, shape[4] - 3)):
        wanted = attention_column_sums(*inputs, columns=some)
        near(ours.sums(votes, some), wanted, torch.float32, terms)
        wanted = attention_column_peaks(*inputs, columns=some)
        near(ours.peaks(votes, some), wanted, torch.float32, terms)


def test_a_query_that_sees_nothing_counts_for_nothing():
    queries, keys, valid, votes = case(SHAPES[0], torch.bfloat16, True)
    valid = valid & (torch.arange(140) > 100)
    sums = Attention(queries, keys, valid, RULES["plain"]).sums(votes, slice(None))
    assert not sums[..., :101].any()
    seen = torch.arange(140) > 100
    near(sums.sum(-1), (votes * seen).sum().expand(1, 1, 2), torch.float32, 600)


def test_no_queries_give_nothing():
    queries, keys, _, votes = case(SHAPES[0], torch.bfloat16, False)
    none = Attention(queries[..., :0, :], keys, None, RULES["plain"])
    assert torch.equal(none.sums(votes[:, :0], slice(None)), torch.zeros(1, 1, 2, 140))
