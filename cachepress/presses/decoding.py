"""Compression while a model generates."""

from dataclasses import dataclass, replace
from typing import NoReturn

from cachepress.budgets import Amount, Fixed, Ratio, TopK, bytes_of, check_ratio
from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.press import BasePress, WrapperPress
from cachepress.presses._checks import counted, either, fill, reconstructs
from cachepress.schedules import AfterPrefill, Every, Schedule
from cachepress.view import Needs


class _WhileDecodingPress(WrapperPress):
    """Base class of presses that compress while decoding; subclasses order these fields anew."""

    compression_interval: int
    hidden_states_buffer_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        counted(self)
        check_count(self, "compression_interval")
        check_count(self, "hidden_states_buffer_size")
        if self.press.schedule != AfterPrefill():
            raise CachepressError(
                f"{type(self).__name__} decides when pairs are evicted, and {self.press!r} does so "
                "already: give it the press that scores"
            )

        if reconstructs(self.press):
            raise CachepressError(
                f"{type(self).__name__} scores decoded tokens, and {self.press!r} reconstructs "
                "prompts: use PrefillDecodingPress with one press for each"
            )

    @property
    def schedule(self) -> Schedule:
        """After the prompt, and whenever ``compression_interval`` tokens came."""
        bounded = bytes_of(counted(self).amount) is not None
        return Every(self.compression_interval, bounded)

    def _within(self, amount: Amount) -> Amount:
        """Limit an amount to what the inner press's bytes hold until the next compression."""
        limit = bytes_of(counted(self).amount)
        if limit is None:
            return amount
        return replace(limit, room=self.compression_interval, most=amount)

    @property
    def needs(self) -> Needs:
        """What the inner press needs, and the buffer of decoded queries."""
        most = min(self.hidden_states_buffer_size, self.compression_interval)
        return replace(self.press.needs, decoded_queries=most)


@dataclass(frozen=True)
class DecodingPress(_WhileDecodingPress, alias="decoding"):
    """Compresses the cache while decoding, down to a fixed number of pairs a head.

    When the prompt is read, and then whenever ``compression_interval`` tokens were decoded, the
    cache is brought down to ``target_size`` pairs: it never holds more than both together. Decoded
    queries are those that attention used, so their positions are the true ones. Needs what the
    inner press needs. Best for long answers in bounded memory.

    Attributes:
        press: the press that scores; its own ratio does not count. Its ``max_bytes`` holds all the
            time, whatever ``target_size`` says.
        compression_interval: decoded tokens between two compressions.
        target_size: pairs that each head keeps, on average where heads compete.
        hidden_states_buffer_size: most decoded queries that a score can use.
    """

    compression_interval: int = 512
    target_size: int = 2048
    hidden_states_buffer_size: int = 256

    def __init__(
        self,
        press: BasePress | None = None,
        compression_interval: int = 512,
        target_size: int = 2048,
        hidden_states_buffer_size: int = 256,
        *,
        base_press: BasePress | None = None,
    ) -> None:
        """Take ``base_press``, kvpress's name, for ``press``, too."""
        values = {
            "press": either("press", press, "base_press", base_press),
            "compression_interval": compression_interval,
            "target_size": target_size,
            "hidden_states_buffer_size": hidden_states_buffer_size,
        }
        fill(self, values)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "target_size")

    @property
    def budget(self) -> TopK:
        """``target_size`` pairs a head, for the heads that compete under the inner press."""
        return replace(counted(self), amount=self._within(Fixed(self.target_size)))

    @property
    def compression_ratio(self) -> None:
        """None: the budget is a number of pairs."""
        return None

    def with_ratio(self, ratio: float) -> NoReturn:
        """Raise: the budget is a number of pairs."""
        raise CachepressError("DecodingPress has no compression ratio: give target_size")


@dataclass(frozen=True)
class CompressionRatioDecodingPress(_WhileDecodingPress, alias="compression_ratio_decoding"):
    """Compresses the cache while decoding, to a fraction of all pairs seen.

    Needs what the inner press needs. Best for long answers whose memory may grow, but slower.

    Attributes:
        press: the press that scores; its own ratio does not count. Its ``max_bytes`` holds all the
            time.
        compression_interval: decoded tokens between two compressions.
        target_compression_ratio: fraction of all pairs seen that are removed.
        hidden_states_buffer_size: most decoded queries that a score can use.
    """

    compression_interval: int = 512
    target_compression_ratio: float = 0.5
    hidden_states_buffer_size: int = 256

    def __init__(
        self,
        press: BasePress | None = None,
        compression_interval: int = 512,
        target_compression_ratio: float = 0.5,
        hidden_states_buffer_size: int = 256,
        *,
        base_press: BasePress | None = None,
    ) -> None:
        """Take ``base_press``, kvpress's name, for ``press``, too."""
        values = {
            "press": either("press", press, "base_press", base_press),
            "compression_interval": compression_interval,
            "target_compression_ratio": target_compression_ratio,
            "hidden_states_buffer_size": hidden_states_buffer_size,
        }
        fill(self, values)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.target_compression_ratio, "target_compression_ratio")

    @property
    def budget(self) -> TopK:
        """The fraction kept, for the heads that compete under the inner press."""
        return replace(counted(self), amount=self._within(Ratio(self.target_compression_ratio)))

    @property
    def compression_ratio(self) -> float:
        """The ratio that the cache is compressed to."""
        return self.target_compression_ratio

    def with_ratio(self, ratio: float) -> "CompressionRatioDecodingPress":
        """Return the press at another ratio."""
        return replace(self, target_compression_ratio=ratio)
