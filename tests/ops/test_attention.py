"""Grouped attention sums against a slow reference that repeats keys."""

import pytest
import torch

from cachepress.ops import AttentionRule, attention_column_sums, attention_weights
from tests.bounds import close
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


@pytest.mark.parametrize(
    "rule",
    [AttentionRule(0.5), AttentionRule(0.7, softcap=2.0), AttentionRule(0.5, sinks=randn(6))],
    ids=["plain", "softcap", "sinks"],
)
def test_sums_over_all_and_over_the_last_queries(rule):
    torch.manual_seed(0)
    queries, keys = randn(B, H, G, T, D), randn(B, H, T, D)
    valid = torch.ones(B, H, T, dtype=torch.bool)
    valid[1, :, :3] = False
    whole = reference(queries, keys, valid, rule)
    counted = whole * valid[:, :, None, :, None]
    for last in (T, Q):
        wanted = counted[..., -last:, :].sum(-2)
        for block in (1, 4, 128):
            sums = attention_column_sums(
                queries[..., -last:, :], keys, valid, valid[:, 0, -last:], rule, block
            )
            close(sums, wanted)
            for some, weights in attention_weights(
                queries[..., -last:, :], keys, valid, rule, block
            ):
                seen, part = weights.shape[-1], whole[..., -last:, :][..., some, :]
                assert not part[..., seen:].any()
                real = valid[:, :, None, -last:, None][..., some, :].expand_as(weights)
                close(weights[real], part[..., :seen][real])
