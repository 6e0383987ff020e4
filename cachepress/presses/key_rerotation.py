"""Key re-rotation: kept keys get positions without gaps."""

from dataclasses import dataclass

from cachepress.press import WrapperPress
from cachepress.view import Needs


@dataclass(frozen=True)
class KeyRerotationPress(WrapperPress, alias="key_rerotation"):
    """Rotates kept keys to positions without gaps, which end at the last position seen.

    The distance from a kept token to the next query is then its rank from the end, as if the
    evicted tokens had never been there; the positions of the tokens to come stay what they are.
    Needs the layer's rotary embedding. Best for contexts near the length that the model was trained
    for.

    Attributes:
        press: the press that chooses the tokens.
    """

    @property
    def needs(self) -> Needs:
        """What the inner press needs, and the rotary embedding."""
        return self.press.needs | Needs(rotary=True, compaction=True)
