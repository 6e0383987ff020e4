"""Statistical leverage of keys: how little the other keys explain one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.limits import MOST
from cachepress.ops import cholesky, wide, wide_dtype
from cachepress.press import ScorerPress
from cachepress.presses.noncausal import standardised
from cachepress.view import LayerView, Needs

_RIDGE = 1e-2


@dataclass(frozen=True)
class LeverageScorePress(ScorerPress, alias="leverage"):
    """Keeps the tokens whose keys before RoPE have the largest statistical leverage.

    Chari and Van Durme, "Compactor: Calibrated Query-Agnostic KV Cache Compression with
    Approximate Leverage Scores" (arXiv:2507.08143), the geometric half. Keys are rotated back,
    projected to fewer channels by a Gaussian matrix and centred; the leverage of a key ``x`` is
    ``x (X'X + 0.01 I)^-1 x'``, standardised over the pairs of the layer. Needs the layer's rotary
    embedding.

    Chosen where the paper says nothing: the matrix is drawn anew for each layer and head, and is
    the same in every run; the small ridge makes short and degenerate texts solvable. Keys that
    are not finite (NaN, infinity) are left out, and are the first to be evicted.
    Best for keeping rare tokens, such as names and numbers, that resemble nothing else in the text.

    Attributes:
        sketch_dimension: channels of the projection.
        seed: another seed gives another projection.
    """

    sketch_dimension: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "sketch_dimension", most=MOST)
        check_count(self, "seed", least=0)

    @property
    def needs(self) -> Needs:
        """The rotary embedding, to rotate the keys back to before RoPE."""
        return Needs(rotary=True)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by standardised leverage, ``[B, H, T]``."""
        if view.rotary is None:
            raise TypeError("the view was made without the rotary embedding")
        keys, rope = wide(view.keys).flatten(0, 1), view.rope.clamp(min=0).flatten(0, 1)
        # Before RoPE, so that a key is not rare for its position alone.
        bare = view.rotary(keys, rope, inverse=True).view(view.keys.shape)
        x = bare @ gaussian(view, bare.shape[-1], self.sketch_dimension, self.seed)
        finite = view.valid & x.double().square().sum(-1).isfinite()
        scores = _leverage(x.double(), finite).masked_fill(view.valid & ~finite, float("nan"))
        return standardised(scores, view.valid).to(x.dtype)


def _leverage(x: Tensor, valid: Tensor) -> Tensor:
    """Compute the leverage of each of ``x [B, H, T, k]`` among the valid ones, ``[B, H, T]``."""
    real = valid.unsqueeze(-1)
    x = x.masked_fill(~real, 0)
    x = (x - x.sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)) * real
    # One k x k system in place of T x T: the diagonal of X (X'X + ridge)^-1 X' is all we need.
    ridge = _RIDGE * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    solved = torch.cholesky_solve(x.mT, cholesky(x.mT @ x + ridge))  # [B, H, k, T]
    return (x * solved.mT).sum(-1)


def gaussian(view: LayerView, inputs: int, outputs: int, seed: int) -> Tensor:
    """Draw a random projection for each head of a layer, ``[H, inputs, outputs]``.

    Drawn from seed, layer and head, on the CPU so that every device gets the same; lengths of
    vectors are kept on average.
    """
    # Seeds of different layers must not meet, and none may exceed 64 bits.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + view.layer) % (1 << 63))
    shape = (view.keys.shape[1], inputs, outputs)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
    return (drawn / outputs**0.5).to(view.keys.device, wide_dtype(view.keys))
