"""The sections by name, each with what gives its cells."""

from collections.abc import Callable

from benchmarks.card.decode import decode, room
from benchmarks.card.kernel import kernel
from benchmarks.card.kvpress import kvpress
from benchmarks.card.lab import Cells, Lab
from benchmarks.card.parity import parity
from benchmarks.card.peaks import peaks
from benchmarks.card.static import static

CELLS: dict[str, Callable[[Lab], Cells]] = {
    "decode": decode,
    "kernel": kernel,
    "parity": parity,
    "peaks": peaks,
    "room": room,
    "transformers": static,
    "kvpress": kvpress,
}
