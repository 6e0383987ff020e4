"""KIVI: quantisation to two bits, keys by channel and values by token."""

from dataclasses import dataclass, replace

from cachepress.cache.codec import Codec
from cachepress.errors import CachepressError
from cachepress.press import WrapperPress
from cachepress.view import Needs

_GROUP = 32


@dataclass(frozen=True)
class KIVIPress(WrapperPress, alias="kivi"):
    """Quantises the keys and values that a press keeps, to 2, 4 or 8 bits.

    Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (arXiv:2402.02750).
    Keys share a scale and a zero point (float16) by channel, in groups of 32 tokens, which are the
    pages of the compressed layer; values by token, in groups of 32 channels, fewer where a head has
    fewer. The newest tokens stay in full precision; decoded ones are quantised page by page as they
    grow older than that. The same as ``press(model, storage=Codec(bits, residual,
    value_group=32))``, which is refused besides. Later compressions score the dequantised keys and
    values. Needs what the inner press needs; head sizes that fill whole bytes.
    Best for long contexts that must stay whole, ``KIVIPress(KnormPress(0.0))``, or on top of a
    mild eviction.

    Attributes:
        press: the press that chooses the tokens; at ratio 0 all of them are quantised.
        bits: of a number, 2, 4 or 8.
        residual: newest tokens of each head that stay in full precision.
    """

    bits: int = 2
    residual: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.press.needs.storage is not None:
            raise CachepressError(
                f"KIVIPress says how pairs are stored, and {self.press!r} does so already: keep one"
            )
        _ = self.needs  # Raises where the numbers are wrong.

    @property
    def needs(self) -> Needs:
        """What the inner press needs, and quantised storage with a scale for each group."""
        codec = Codec(self.bits, self.residual, value_group=_GROUP)
        return replace(self.press.needs, storage=codec)
