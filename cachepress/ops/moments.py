"""Second moments of vectors: they are summed up block by block, and applied as quadratic forms."""

from typing import NamedTuple

from torch import Tensor


class RunningMoments(NamedTuple):
    """Number ``[..., 1]``, mean ``[..., D]`` and scatter ``[..., D, D]`` of vectors so far.

    The scatter is the sum of the outer products of what vectors differ from their mean by: the
    covariance, times their number.
    """

    total: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Tensor, counted: Tensor) -> "RunningMoments":
        """Compute them for the vectors ``x [..., n, D]`` that are ``counted [..., n]``."""
        weight = counted.unsqueeze(-1).to(x.dtype)
        count = weight.sum(-2)
        mean = (x * weight).sum(-2) / count.clamp(min=1)
        centred = (x - mean.unsqueeze(-2)).mul_(weight)
        return cls(count, mean, centred.mT @ centred)

    def join(self, other: "RunningMoments") -> "RunningMoments":
        """Combine the moments of two sets of vectors, without the vectors (Chan et al.)."""
        total = self.total + other.total
        step = other.mean - self.mean
        share = other.total / total.clamp(min=1)
        between = step.unsqueeze(-1) * step.unsqueeze(-2) * (self.total * share).unsqueeze(-1)
        return RunningMoments(
            total, self.mean + step * share, self.scatter + other.scatter + between
        )

    def after(self, before: "RunningMoments | None") -> "RunningMoments":
        """Combine them with those of vectors before, if there were any."""
        return self if before is None else before.join(self)


def quadratic_forms(x: Tensor, matrices: Tensor) -> Tensor:
    """Compute x' M x of ``x [B, H, n, D]`` for ``matrices [B, H, G, D, D]``, ``[B, H, G, n]``."""
    # The matrices stand side by side, so that x is multiplied once and not copied for each.
    columns = matrices.transpose(2, 3).flatten(3)  # [B, H, D, G * D]
    products = (x @ columns).unflatten(-1, matrices.shape[2:4])  # [B, H, n, G, D]
    return products.mul_(x.unsqueeze(-2)).sum(-1).mT
