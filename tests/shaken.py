"""What other processors do to the last bits of a model's numbers, on any processor.

Sums that are taken in another order end with other last bits. A test that hangs on them is green
here and red elsewhere; with ``CACHEPRESS_SHAKEN`` set to a number it is red here.
"""

import os
from functools import cache

import torch
from torch import Tensor, nn

SEED = int(os.environ.get("CACHEPRESS_SHAKEN", 0))


def shaken(model: nn.Module) -> nn.Module:
    """The model, what its weights make of their inputs moved by one bit at most, or not at all.

    The same places of the same shape are always moved alike, as by one processor.
    """
    for module in model.modules() if SEED else ():
        if next(module.children(), None) is None and next(module.parameters(), None) is not None:
            module.register_forward_hook(_shake)
    return model


def _shake(module: nn.Module, inputs: object, output: object) -> Tensor | None:
    # What is copied is alike everywhere; what is coarser than float32 is not compared so closely.
    if isinstance(module, nn.Embedding) or not isinstance(output, Tensor):
        return None
    if output.dtype not in (torch.float32, torch.float64):
        return None
    moves = _moves(output.numel()).to(output.dtype).view_as(output)
    return output * (1 + torch.finfo(output.dtype).eps * moves)


@cache
def _moves(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED + n)
    return torch.randint(-1, 2, (n,), generator=generator)
