"""The handle that a compressed layer gives to a model in place of its keys and values."""

from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from cachepress.errors import ForeignAttentionError

if TYPE_CHECKING:
    from cachepress.cache.layer import CompressedLayer
    from cachepress.cache.snapshot import Snapshot

_ATTRIBUTES = (
    "shape dtype device ndim layout requires_grad grad is_leaf is_cuda is_mps is_mkldnn is_nested "
    "is_sparse is_quantized _base"
)
_METHODS = "size dim stride storage_offset untyped_storage is_neg is_conj _is_view"
_READABLE = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()} | {
    getattr(Tensor, name) for name in _METHODS.split()
}
"""What models, and torch.compile between two graphs, ask of a tensor without its numbers."""


class RowsHandle(Tensor):
    """Tensor without data in place of a layer's keys or values; computing with it raises an error.

    Only our attention function can read it. Any other function would take the pairs that are held
    for the text itself and compute a wrong token; it gets an error instead. It has the shape that
    the text has, ``[B, H, S, D]``, and no memory of its own.

    Attributes:
        layer: the cache layer that made it.
        snapshot: what it held at that moment, before anything was evicted.
        fresh: keys and values of the forward, if they are all that is held.
    """

    layer: "CompressedLayer"
    snapshot: "Snapshot"
    fresh: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls,
        layer: "CompressedLayer",
        snapshot: "Snapshot",
        added: tuple[Tensor, Tensor],
        like: Tensor,
    ) -> "RowsHandle":
        """Make a handle of ``layer`` with the type of ``like``, in the shape of the whole text."""
        b, h, _, d = like.shape
        handle = blank(like.dtype, like.device).expand(b, h, snapshot.seen, d).as_subclass(cls)
        handle.layer, handle.snapshot = layer, snapshot
        handle.fresh = added if snapshot.seen == like.shape[2] else None
        return handle

    @classmethod
    def __torch_function__(
        cls, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        """Answer questions about shape, type and device; raise ForeignAttentionError otherwise."""
        if func in _READABLE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))  # type: ignore
        return _refuse(getattr(func, "__name__", str(func)))


class TracedHandle(RowsHandle):
    """Stands for a token's keys or values within a graph that torch.compile makes."""


@lru_cache
def blank(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make the one number that all handles of a type and device expand."""
    with torch.inference_mode(False):
        return torch.full((1,), float("nan"), dtype=dtype, device=device)


def _refuse(name: str) -> NoReturn:
    raise ForeignAttentionError(
        f"{name}() was called on the keys or values of a cachepress cache: only the attention "
        "function that `with press(model)` selects on the model can read them, and another one is "
        "selected, or this is another model or a copy of it; enter `with press(model)` again, or "
        "give the model a fresh cache"
    )
