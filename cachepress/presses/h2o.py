"""H2O: what drew the most attention so far, and the newest rows."""

from dataclasses import dataclass

from torch import Tensor

from cachepress.budgets import check_fraction, floor_of
from cachepress.press import ScorerPress
from cachepress.ranks import pin
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class H2OPress(ScorerPress, alias="h2o"):
    """Keeps the heavy hitters, whose attention received adds up to the most, and the newest rows.

    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
    Models" (arXiv:2306.14048). The sums are plain, so early rows, which more queries see, gain by
    it. They go on from turn to turn: what a row received so far is left with it.
    ``DecodingPress(H2OPress(), compression_interval=1, target_size=n)`` is the paper's algorithm,
    which drops a row with every token. Attention is averaged over the query heads of a KV head,
    which the paper leaves open. Decoded tokens count where the schedule settles them. Needs the
    attention sums, and 4 bytes with each row (8 in float64).
    Best for long generations, inside of DecodingPress.

    Attributes:
        recent_ratio: fraction of the rows kept that are the newest ones, rounded down.
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
        """Attention received so far, the newest rows above all, ``[B, H, T]``."""
        newest = floor_of(view.n_kept.double(), self.recent_ratio)
        recent = view.index >= (view.n_seen - newest)[:, None, None]
        return pin(self.token_state(view), recent)

    def token_state(self, view: LayerView) -> Tensor:
        """Attention received in all turns so far, ``[B, H, T]``."""
        if view.attention_sums is None:
            raise TypeError("the view was made without attention sums")
        received = view.attention_sums.mean(2)
        return (
            received
            if view.token_state is None
            else received + view.token_state.nan_to_num(nan=0.0)
        )
