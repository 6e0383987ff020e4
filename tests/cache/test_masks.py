"""A position bias is one more part of the mask, which differs from head to head."""

import pytest
import torch

from cachepress.cache.masks import BiasedMask
from cachepress.errors import UnsupportedError
from tests.bounds import close
from tests.tiny import randn

LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_the_bias_is_added_to_what_is_visible(kind):
    n, s = 3, 7
    torch.manual_seed(0)
    bias, causal = randn(1, 4, n, s), torch.ones(n, s, dtype=torch.bool).tril(s - n)
    mask = {"none": None, "bool": causal.expand(2, 1, n, s)}
    mask["added"] = torch.zeros(2, 1, n, s, dtype=torch.float64).masked_fill(~causal, LOWEST)
    found = BiasedMask(mask[kind], n, bias)
    assert found.per_head
    b = 1 if kind == "none" else 2
    close(found.by_head[..., causal], bias.expand(b, -1, -1, -1)[..., causal])
    assert (found.by_head[..., ~causal] < LOWEST / 2).all()
    close(found.given[..., causal], found.by_head[..., causal])
    assert found.given.isfinite().all()


def test_padding_is_that_of_the_mask_alone():
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., :2] = False
    valid = BiasedMask(mask, 1, randn(1, 4, 1, 5)).valid
    assert valid.tolist() == [[True] * 5, [False, False, True, True, True]]


def test_it_is_not_read_in_groups():
    with pytest.raises(UnsupportedError, match="position bias"):
        BiasedMask(None, 1, randn(1, 4, 1, 5)).of_sequences(0, 1)
