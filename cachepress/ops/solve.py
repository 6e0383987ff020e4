"""Cholesky factors of Gram matrices, which rounding can make singular."""

import torch
from torch import Tensor

_TRIES = 24
"""Of these the last one adds more than the largest sum of squares itself."""


def cholesky(gram: Tensor) -> Tensor:
    """Factorise ``gram [..., k, k]``, a Gram matrix with a small ridge, by Cholesky, in doubles.

    Where a few rows are so much larger than others that rounding takes the ridge away, as little
    is added to the diagonal as lets it be factored.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    lift = gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True) * torch.finfo(gram.dtype).eps
    for _ in range(_TRIES):
        bad = (failed > 0).unsqueeze(-1)
        if not bool(bad.any()):
            break
        lifted = gram + torch.diag_embed((lift * bad).expand(gram.shape[:-1]))
        again, failed_again = torch.linalg.cholesky_ex(lifted)
        factor = torch.where(bad.unsqueeze(-1), again, factor)
        failed, lift = torch.where(bad.squeeze(-1), failed_again, failed), lift * 8
    return factor
