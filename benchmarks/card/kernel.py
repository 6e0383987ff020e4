"""Attention of one decoded token in one layer: bandwidth against SDPA and against a copy.

Several layers' pairs are read in turn, as a model does, so that they come from memory and not from
the chip's own cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.card.lab import Cells, Lab
from benchmarks.card.plan import Sizes
from benchmarks.card.records import Values, line_of
from benchmarks.card.timing import LEAST, graphed, seconds_of
from cachepress.cache.codec import Codec
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.masks import TextMask
from cachepress.ops import AttentionRule

HEADS, GROUP, WIDTH = 8, 4, 128
SPREAD = (0.1, 1.9)
"""Shares of the average that heads keep where they keep different numbers."""
LEAST_READ = 2**28
"""Bytes that layers have together, some times what the cache of a chip holds."""
MOST_LAYERS = 96
TAIL = 4


@dataclass(frozen=True)
class Shape:
    """What one layer holds.

    Attributes:
        batch: sequences.
        length: tokens of each.
        ratio: of the pairs that are evicted.
        even: whether every head keeps as many.
        storage: how pairs are stored.
    """

    batch: int
    length: int
    ratio: float
    even: bool
    storage: str = "full"

    @property
    def name(self) -> str:
        """The name of its cell."""
        kept = "evenly" if self.even else "unevenly"
        stored = "" if self.storage == "full" else f", {self.storage}"
        return f"{self.batch} x {self.length}, {self.ratio:.0%} evicted {kept}{stored}"


def shapes(sizes: Sizes) -> list[Shape]:
    """List what is measured, the most important first."""
    one, some, many = sizes.batches
    found = []
    contexts = ((one, sizes.short), (some, sizes.short), (one, sizes.longest // 2))
    for batch, length in (*contexts, (many, sizes.short // 2)):
        found += [Shape(batch, length, 0.9, False), Shape(batch, length, 0.0, True)]
        found += [Shape(batch, length, 0.5, False), Shape(batch, length, 0.9, True)]
    for storage in ("int4", "int8"):
        found += [Shape(some, sizes.short, 0.0, True, storage)]
        found += [Shape(some, sizes.short, 0.5, False, storage)]
    return found


def kernel(lab: Lab) -> Cells:
    """Give a cell for each shape."""
    for shape in shapes(lab.sizes):
        yield shape.name, partial(measured, lab, shape)


def measured(lab: Lab, shape: Shape) -> Values:
    """Measure microseconds of our attention and of SDPA over the whole cache."""
    dtype = torch.bfloat16 if lab.is_gpu else torch.float32
    whole = 2 * shape.batch * HEADS * shape.length * WIDTH * dtype.itemsize
    size = (shape.batch, HEADS, shape.length, WIDTH)

    def text() -> list[Tensor]:
        return [torch.randn(size, device=lab.device, dtype=dtype) for _ in range(2)]

    layers = [layer_of(shape, *text())]
    read = _read(layers[0], shape)
    layers += [layer_of(shape, *text()) for _ in range(_copies(lab, read) - 1)]
    query = torch.randn(
        shape.batch, HEADS * GROUP, 1, WIDTH, device=lab.device, dtype=dtype
    )  # [B, H * G, 1, D]
    ours = _per_layer(partial(_attend_all, layers, query), lab, len(layers))
    layers.clear()
    texts = [text() for _ in range(_copies(lab, whole))]
    theirs = _per_layer(partial(_sdpa_all, texts, query), lab, len(texts))
    best, other = _best(ours), _best(theirs)
    return {
        "batch": shape.batch,
        "length": shape.length,
        "ratio": shape.ratio,
        "even": shape.even,
        "storage": shape.storage,
        "bytes": read,
        "sdpa_bytes": whole,
        **ours,
        **{f"sdpa_{name}": value for name, value in theirs.items()},
        "gb_s": read / best / 1e3,
        "of_copy": read / (1e-6 * best) / lab.copy,
        "sdpa_of_copy": whole / (1e-6 * other) / lab.copy,
        "of_sdpa": best / other,
    }


def _copies(lab: Lab, read: int) -> int:
    """Say how many layers are read in turn."""
    return max(1, min(MOST_LAYERS, -(-LEAST_READ // read))) if lab.is_gpu else 2


def _sdpa_all(texts: Sequence[Sequence[Tensor]], query: Tensor) -> None:
    for keys, values in texts:
        scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def _attend_all(layers: Sequence[CompressedLayer], query: Tensor) -> None:
    for layer in layers:
        attention_of(layer, query)


def attention_of(layer: CompressedLayer, query: Tensor) -> Tensor:
    """Compute attention of ``query [B, H * G, 1, D]`` over a layer, ``[B, 1, H * G, D]``."""
    return layer.snapshot.attend(query, TextMask(None, 1), AttentionRule(WIDTH**-0.5))


def layer_of(shape: Shape, keys: Tensor, values: Tensor) -> CompressedLayer:
    """Make a layer of some pairs of a text ``[B, H, T, D]``, and some decoded tokens."""
    layer = CompressedLayer.adopt(keys, values)
    layer.codec = Codec.of(shape.storage)
    share = 1 - shape.ratio
    spread = (1.0, 1.0) if shape.even else SPREAD
    counts = torch.linspace(*spread, HEADS, device=keys.device) * share * shape.length
    counts = counts.clamp(1, shape.length)[None, :, None]
    mask = torch.arange(shape.length, device=keys.device).expand(keys.shape[:3]) < counts
    layer.keep(layer.snapshot.rows(), mask)
    layer.update(keys[:, :, :TAIL], values[:, :, :TAIL])
    return layer


def _read(layer: CompressedLayer, shape: Shape) -> int:
    """Compute the bytes of the pairs that are read, without free slots; quantized, with scales."""
    if shape.storage != "full":
        return layer.nbytes
    pair = layer.whole_nbytes // (layer.get_seq_length() * layer.lengths.numel())
    return int(layer.lengths.sum()) * pair


def _per_layer(work: Callable[[], object], lab: Lab, copies: int) -> Values:
    """Time work as it is called, and as a graph where it can be captured; microseconds a layer."""
    least = LEAST if lab.is_gpu else LEAST / 10
    found: Values = {"calls_us": 1e6 * seconds_of(work, lab.device, least) / copies}
    if not lab.is_gpu:
        return found
    try:
        found["graph_us"] = 1e6 * seconds_of(graphed(work), lab.device) / copies
    except Exception as error:  # What cannot be captured is timed by its calls alone.
        found["not_captured"] = line_of(error)
    return found


def _best(times: Values) -> float:
    return float(times.get("graph_us", times["calls_us"]))  # type: ignore
