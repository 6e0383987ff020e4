"""Cache layers that watch what a model does with its cache, while it is tried out."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from cachepress.cache.handle import RowsHandle
from cachepress.cache.hybrid import CompressedHybridLayer
from cachepress.cache.layer import CompressedLayer
from cachepress.errors import CachepressError

_NEAR = 1e-2
"""How far attention may be from the model's own in float32, by the size of the largest value."""

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""Computes attention of ``(query, keys, values, mask)``."""


class Fault(Exception):
    """Says what a model does that a compressed cache cannot do."""


class WatchedLayer(CompressedLayer):
    """Cache layer that computes attention twice, as without compression and as with it, to compare.

    The model goes on with the former, so that its results must be those of an ordinary cache, bit
    for bit, whatever hangs on rounding.
    """

    _traceable = False

    def __init__(self) -> None:
        super().__init__()
        self.index = self.new = self.filled = self.attended = 0
        self.plain: tuple[Tensor, ...] = ()

    @classmethod
    def instead_of(cls, layer: object, index: int) -> "WatchedLayer":
        """Make a layer that watches, in place of an empty cache layer of transformers."""
        hybrid = isinstance(layer, LinearAttentionLayer)
        made = WatchedHybridLayer.adopt_layer(layer) if hybrid else cls()
        made.index = index
        return made

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A stand-in for the keys: it tells whether there are any, and raises a fault if read."""
        return cast(Tensor, _Some("keys", self.plain[0].numel())) if self.plain else None

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A stand-in for the values: it tells whether there are any, and raises a fault if read."""
        return cast(Tensor, _Some("values", self.plain[1].numel())) if self.plain else None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the pairs of a forward, and return what takes note of its use."""
        new = (key_states, value_states)
        self.filled += 1
        if self.filled > 1:
            raise Fault(f"fills layer {self.index} of its cache more than once in a forward")
        if not all(isinstance(x, Tensor) and x.ndim == 4 for x in new):
            raise Fault("keeps something else in its cache than keys and values of heads")
        self.new = key_states.shape[2]
        old = self.plain or tuple(x[:, :, :0] for x in new)
        self.plain = tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
        self._append(*new)
        keys, values = (Watched.of(self, self.snapshot, new, x) for x in new)
        self.handles = (keys, values)
        return keys, values

    def compare(self, query: Tensor, mask: object, own: Attend, ours: Attend) -> None:
        """Raise a fault unless both attention functions give the same, in float32 at least."""
        if query.dtype.itemsize < 4:
            try:
                return self._compare(query.float(), _wide(mask), own, ours)
            except (RuntimeError, TypeError, ValueError):  # Some functions take half types only.
                pass
        self._compare(query, mask, own, ours)

    def _compare(self, query: Tensor, mask: object, own: Attend, ours: Attend) -> None:
        n, (keys, values) = self.new, (x.to(query.dtype) for x in self.plain)
        layer = CompressedLayer.adopt(keys[:, :, :-n], values[:, :, :-n])
        new = (keys[:, :, -n:], values[:, :, -n:])
        handles = layer.update(*new)  # pyright: ignore[reportAttributeAccessIssue]
        with torch.autocast(query.device.type, enabled=False):
            found, wanted = ours(query, *handles, mask)[0], own(query, keys, values, mask)[0]
        if not close(found, wanted, max(_NEAR, torch.finfo(wanted.dtype).eps ** 0.5)):
            raise Fault(
                "tells attention more than keys, values and a mask, which a compressed cache does "
                "not know"
            )

    def check(self) -> None:
        """Raise a fault unless the layer was filled and attended to in a forward."""
        if not self.filled:
            raise Fault(f"does not fill layer {self.index} of its cache")
        if not self.attended:
            raise Fault(
                "does not take keys from its cache to transformers' attention interface: what is "
                "evicted could not be left out"
            )
        self.filled = self.attended = 0


class WatchedHybridLayer(WatchedLayer, CompressedHybridLayer):
    """Layer that watches, with a recurrent state beside its pairs."""


class _Some:
    """Stands for the keys or values of a cache where a model reads it without attention."""

    def __init__(self, name: str, n: int) -> None:
        self._name, self._n = name, n

    def numel(self) -> int:
        """Count numbers."""
        return self._n

    def __getattr__(self, name: str) -> object:
        raise Fault(f"reads {self._name} in its cache itself, not by its attention function")


class Watched(RowsHandle):
    """Handle of a layer that watches: attention over it is computed by ``watch``."""

    layer: WatchedLayer  # pyright: ignore[reportIncompatibleVariableOverride]

    def watch(
        self, query: Tensor, value: Tensor, mask: object, own: Attend, ours: Attend
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention as the model does by itself, and check that we compute the same.

        Args:
            query: ``[B, H * G, n, D]``.
            value: what the model gives as values.
            mask: the attention mask.
            own: the attention function of the model.
            ours: the attention function of compressed layers, which takes handles.
        """
        layer = self.layer
        if self is not layer.handles[0] or value is not layer.handles[1]:
            raise Fault("gives attention other values than those of its cache")
        layer.attended += 1
        if layer.plain[0].shape[2] > query.shape[2]:
            layer.compare(query, mask, own, ours)
        return own(query, *layer.plain, mask)

    @classmethod
    def __torch_function__(
        cls, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        """Answer questions about shape, type and device; raise a fault otherwise."""
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except CachepressError:
            name = getattr(func, "__name__", str(func))
            raise Fault(
                f"computes {name}() of its keys or values between the cache and attention, which a "
                "compressed cache does not hand out"
            ) from None


def close(ours: Tensor, wanted: Tensor, bound: float) -> bool:
    """Tell whether tensors are the same but for rounding, by the size of the largest number."""
    size = wanted[wanted.isfinite()].abs().max() if bool(wanted.isfinite().any()) else 0
    return torch.allclose(ours, wanted, rtol=0, atol=bound * float(size), equal_nan=True)


def _wide(mask: object) -> object:
    if isinstance(mask, Tensor) and mask.is_floating_point():
        return mask.float()
    return mask
