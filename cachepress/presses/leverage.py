"""Statistical leverage of keys: how little the other keys explain one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.limits import MOST
from cachepress.ops import RunningMoments, blocks, cholesky, on_device, wide_dtype
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
        b, h, t, d = view.keys.shape
        matrix = gaussian(view, d, self.sketch_dimension, self.seed)
        parts = list(blocks(t, b * h * max(d, 2 * self.sketch_dimension)))
        moments = None
        for some in parts:
            x, finite = _projected(view, some, matrix)
            moments = RunningMoments.of(x, finite).after(moments)
        assert moments is not None
        whitening = _whitening(moments.scatter)

        def leverage(some: slice) -> Tensor:
            x, finite = _projected(view, some, matrix)
            size = ((x - moments.mean.unsqueeze(-2)) @ whitening).square().sum(-1)
            lost = view.valid[..., some] & ~finite
            return size.masked_fill(~finite, 0).masked_fill(lost, float("nan"))

        scores = torch.cat([leverage(some) for some in parts], dim=-1)
        return standardised(scores, view.valid).to(wide_dtype(view.keys))


def _projected(view: LayerView, tokens: slice, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Project keys before RoPE, so that none is rare for its position alone.

    Returns:
        ``[B, H, n, k]`` in doubles, 0 where they are not valid or not finite, and ``[B, H, n]``
        which are both.
    """
    x = (view.unrotated(tokens) @ matrix).double()
    finite = view.valid[..., tokens] & x.square().sum(-1).isfinite()
    return x.masked_fill_(~finite.unsqueeze(-1), 0), finite


def _whitening(scatter: Tensor) -> Tensor:
    """Invert a Cholesky factor of ``scatter [B, H, k, k]``: the leverage of centred x is |x W|^2.

    One k x k system in place of T x T: the diagonal of X (X'X + ridge)^-1 X' is all we need.
    """
    unit = torch.eye(scatter.shape[-1], dtype=scatter.dtype, device=scatter.device)
    factor = cholesky(scatter + _RIDGE * unit)
    return torch.linalg.solve_triangular(factor, unit.expand_as(factor), upper=False).mT


def gaussian(view: LayerView, inputs: int, outputs: int, seed: int) -> Tensor:
    """Draw a random projection for each head of a layer, ``[H, inputs, outputs]``.

    Drawn from seed, layer and head, on the CPU so that every device gets the same; lengths of
    vectors are kept on average.
    """
    # Seeds of different layers must not meet, and none may exceed 64 bits.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + view.layer) % (1 << 63))
    shape = (view.keys.shape[1], inputs, outputs)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
    return on_device((drawn / outputs**0.5).to(wide_dtype(view.keys)), view.keys.device)
