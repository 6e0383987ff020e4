"""DMS: tokens whose score is below a threshold are evicted once they are out of the window."""

from dataclasses import dataclass, field, replace
from typing import NoReturn

from torch import Tensor

from cachepress.budgets import Threshold
from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.hf.types import PreTrainedModel
from cachepress.press import BasePress, WrapperPress
from cachepress.presses._checks import fill, reconstructs
from cachepress.ranks import pin_window
from cachepress.schedules import AfterPrefill, Every, Schedule
from cachepress.view import LayerView, Needs


@dataclass(frozen=True)
class DMSPress(WrapperPress, alias="dms"):
    """Evicts the tokens whose score is below a threshold, except for the newest ones.

    Lancucki et al., "Inference-Time Hyper-Scaling with KV Cache Compression" (Dynamic Memory
    Sparsification, arXiv:2506.05345), the way it is run: how much is evicted depends on the text.
    The paper trains the model to decide; here the decision is a score and a threshold, so a score
    of a fixed scale is wanted. Every head holds its own number of pairs, at least one. While
    decoding, a layer is compressed every ``interval`` tokens, and at most that many more than the
    rule says are held; pairs that are held are scored anew each time. Needs what the inner press
    needs. Best for scores that a token has from the start, such as those of
    ``DMSPress(KVzapPress(), threshold=-4, decoding=True)``.

    Attributes:
        press: the press that scores; its own ratio does not count.
        threshold: least score that stays; it may be left out until the press is used.
        sliding_window_size: newest tokens, which always stay.
        decoding: whether tokens are evicted during decoding, too.
        interval: decoded tokens between two compressions; 1 to compress at every token.
    """

    threshold: float | None
    sliding_window_size: int = 128
    decoding: bool = False
    interval: int = field(default=32, kw_only=True)

    def __init__(
        self,
        press: BasePress,
        threshold: float | None = None,
        sliding_window_size: int = 128,
        decoding: bool = False,
        *,
        interval: int = 32,
    ) -> None:
        values = {
            "press": press,
            "threshold": threshold,
            "sliding_window_size": sliding_window_size,
            "decoding": decoding,
            "interval": interval,
        }
        fill(self, values)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "sliding_window_size", least=0)
        check_count(self, "interval")
        given = self.threshold
        if given is not None and (isinstance(given, bool) or not isinstance(given, int | float)):
            raise CachepressError(f"threshold: got {self.threshold!r}, wanted a number")
        if self.press.schedule != AfterPrefill():
            raise CachepressError(
                f"DMSPress decides when pairs are evicted, and {self.press!r} does so already: "
                "give it the press that scores"
            )
        if reconstructs(self.press) and self.press.needs.reconstruction is None:
            raise CachepressError(
                f"{self.press!r} reconstructs nothing at ratio 0: give it a ratio above 0, which "
                "then does not count"
            )
        if self.decoding and self.press.needs.reconstruction is not None:
            raise CachepressError(
                f"decoded tokens have no score by {self.press!r}, which reconstructs prompts: "
                "leave out decoding, or use KVzapPress"
            )

    @property
    def budget(self) -> Threshold:
        """The pairs whose score reaches the threshold."""
        return Threshold(self._given_threshold())

    @property
    def schedule(self) -> Schedule:
        """After the prompt, and during decoding if that is wanted."""
        return Every(self.interval) if self.decoding else AfterPrefill()

    @property
    def needs(self) -> Needs:
        """What the inner press needs, and no more decoded queries than are compressed at once."""
        inner = self.press.needs
        return replace(inner, decoded_queries=min(inner.most_decoded, self.interval))

    @property
    def compression_ratio(self) -> None:
        """None: how many pairs are kept depends on their scores."""
        return None

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by the inner press, the window above all, ``[B, H, T]``."""
        return pin_window(self.press.score(view), view, self.sliding_window_size)

    def with_ratio(self, ratio: float) -> NoReturn:
        """Raise: there is a threshold instead of a ratio."""
        raise CachepressError("DMSPress has no compression ratio: give threshold")

    def for_model(self, model: PreTrainedModel) -> BasePress:
        """Check that there is a threshold, and make the inner press ready for a model."""
        self._given_threshold()
        return super().for_model(model)

    def _given_threshold(self) -> float:
        if self.threshold is None:
            raise CachepressError(
                f"DMSPress keeps what scores at least a threshold, and {self!r} has none: give it "
                "one, such as threshold=-4 for KVzapPress"
            )
        return self.threshold
