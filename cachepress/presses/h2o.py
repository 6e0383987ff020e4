"""H2O: tokens that received the most attention so far, and the newest ones."""

from dataclasses import dataclass

from torch import Tensor

from cachepress.budgets import check_fraction, floor_of
from cachepress.press import ScorerPress
from cachepress.ranks import pin
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class H2OPress(ScorerPress, alias="h2o"):
    """Keeps heavy hitters, the tokens that received the most attention in total, and the newest.

    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
    Models" (arXiv:2306.14048). The sums are plain, so early tokens, which more queries see, gain
    by it. They are kept with the tokens from one compression to the next, and added to.
    ``DecodingPress(H2OPress(), compression_interval=1, target_size=n)`` is the paper's algorithm,
    which evicts a token with every decoded one. Attention is averaged over the query heads of a KV
    head, which the paper leaves open. Decoded queries count where the schedule compresses during
    decoding. Needs the attention sums, and 4 bytes with each pair (8 in float64).
    Best for long generations, inside of DecodingPress.

    Attributes:
        recent_ratio: fraction of the tokens kept that are the newest ones, rounded down.
    """

    recent_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.recent_ratio, "recent_ratio")

    @property
    def needs(self) -> Needs:
        """Attention received by each token, which is summed up from one compression to the next."""
        return Needs(attention_sums=True, token_state=True)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by attention received so far, the newest above all, ``[B, H, T]``."""
        newest = floor_of(view.n_kept.double(), self.recent_ratio)
        recent = view.index >= (view.n_seen - newest)[:, None, None]
        return pin(self.token_state(view), recent)

    def token_state(self, view: LayerView) -> Tensor:
        """Attention received from all queries so far, ``[B, H, T]``."""
        if view.attention_sums is None:
            raise TypeError("the view was made without attention sums")
        received = view.attention_sums.mean(2)
        return (
            received
            if view.token_state is None
            else received + view.token_state.nan_to_num(nan=0.0)
        )
