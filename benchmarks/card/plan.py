"""What is measured at which sizes, and the seconds that each section may take."""

from dataclasses import asdict, dataclass

SECTIONS: dict[str, float] = {
    "decode": 110,
    "kernel": 30,
    "parity": 90,
    "peaks": 100,
    "room": 70,
    "transformers": 90,
    "kvpress": 60,
}
"""Seconds that a section may take at most of a run of six minutes, the most important first."""
OF_MINUTES = 6.0
GRACE = 20.0
"""Seconds of them that a section may go on with what it is at when its own are up."""


@dataclass(frozen=True)
class Sizes:
    """Lengths and batch sizes.

    Attributes:
        short: tokens of a short context.
        long: tokens of a long one.
        longest: tokens of the longest one.
        batches: sequences at once.
        layers: layers of the model.
        few_layers: layers where prefill alone is measured.
        some_layers: layers where transformers compiles the model.
        steps: decoded tokens of one measurement.
        every: the parity of every n-th press is looked at.
    """

    short: int = 8192
    long: int = 32768
    longest: int = 131072
    batches: tuple[int, int, int] = (1, 8, 32)
    layers: int = 32
    few_layers: int = 4
    some_layers: int = 8
    steps: int = 48
    every: int = 1


TINY = Sizes(96, 192, 288, (1, 2, 3), layers=4, few_layers=2, some_layers=3, steps=6, every=25)


@dataclass(frozen=True)
class Job:
    """What a worker is told.

    Attributes:
        data: the path of the JSON.
        sections: names.
        end: when it has to end, in seconds since the epoch.
        minutes: what the whole run may take.
        device: "cuda" or "cpu".
        tiny: whether shapes are tiny.
        kvpress_python: an interpreter that has kvpress; None for none.
    """

    data: str
    sections: list[str]
    end: float
    minutes: float
    device: str
    tiny: bool
    kvpress_python: str | None = None

    @property
    def sizes(self) -> Sizes:
        """The lengths and batch sizes."""
        return TINY if self.tiny else Sizes()


def allowed(name: str, minutes: float) -> float:
    """Compute the seconds that a section may take in a run of some minutes."""
    return SECTIONS[name] * minutes / OF_MINUTES


def grace(minutes: float) -> float:
    """Compute the seconds after those after which a section is killed."""
    return GRACE * minutes / OF_MINUTES


def sizes_of(tiny: bool) -> dict[str, object]:
    """Return the sizes as the JSON holds them."""
    sizes = asdict(TINY if tiny else Sizes())
    return {**sizes, "batches": list(sizes["batches"])}
