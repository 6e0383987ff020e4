"""Output projections are found and read whatever form their weights have."""

import pytest
import torch
from torch import Tensor, nn

import cachepress as cp
from cachepress.hf.projection import Projections
from tests.bounds import close
from tests.tiny import exact_tiny, randn, tokens
from tests.tiny_cache import kept, pressed

PRESS = cp.CriticalKVPress(cp.KnormPress(0.5))


class Packed(nn.Module):
    """What quantised linear modules have in common: their sizes, and weights that are no matrix.

    bitsandbytes packs four bits into ``weight [n, 1]``, GPTQ and AWQ into ``qweight`` and no
    ``weight`` at all.
    """

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = linear.weight.data.reshape(-1, 1).view(torch.uint8)
        self.register_buffer(name, packed)

    def forward(self, x: Tensor) -> Tensor:
        packed = next(self.buffers()).view(torch.float64)
        return x @ packed.view(self.out_features, self.in_features).T


@pytest.mark.parametrize("name", ["weight", "qweight"])
def test_packed_weights_are_read_like_plain_ones(name):
    ids = tokens(30)
    wanted = kept(pressed(exact_tiny(), PRESS, ids))
    model = exact_tiny()
    for layer in model.model.layers:
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, projection)
            setattr(layer.self_attn, projection, Packed(linear, name))
    assert kept(pressed(model, PRESS, ids)) == wanted


@pytest.mark.parametrize("name", ["weight", "qweight", None])
def test_the_matrix_is_that_of_the_module(name):
    linear, attention = nn.Linear(8, 6, bias=False).double(), nn.Module()
    attention.o_proj = linear if name is None else Packed(linear, name)
    attention.other = nn.Linear(7, 8).double()
    found = Projections().find(attention, [], 2, randn(1, 3, 4, 2))
    close(found.reshape(8, 6), linear.weight.T.detach())


def test_of_two_that_fit_none_is_taken():
    attention = nn.Module()
    attention.one, attention.two = nn.Linear(8, 6), nn.Linear(8, 6)
    assert Projections().find(attention, [], 2, randn(1, 3, 4, 2)) is None
    assert Projections().find(attention, [attention.one], 2, randn(1, 3, 4, 2).float()) is not None
