"""Two devices on a machine with none: tensors that say where they are, and refuse to be mixed.

A tensor that was made on "meta:0" in the block ``devices()`` computes on the CPU, with true
numbers, and says that it is on "meta:0". What PyTorch refuses on real devices is refused here: to
combine tensors of two devices, but for numbers without dimensions and for indices from the CPU.
What is copied from such a device to another is in ``MOVES``, but for what the model's own code
copies: its hooks, and rotary modules, some of which bring their frequencies along.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel

from cachepress.cache.handle import RowsHandle

CPU = torch.device("cpu")
MOVES: list[tuple[torch.device, torch.device, torch.Size]] = []
"""Where from, where to, and the shape."""
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Placed(Tensor):
    """A tensor on a device that there is none of: ``inner`` has its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> "Placed":
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )

    def __init__(self, inner: Tensor, device: torch.device) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"Placed({self.inner!r}, {self.device})"

    def tolist(self) -> object:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Run an operation on the CPU, as if on the device of its tensors."""
    kwargs = dict(kwargs)
    wanted = kwargs.get("device")
    if wanted is not None:
        wanted, kwargs["device"] = torch.device(wanted), CPU
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    name = func.name().split(".")[0]
    places = {x.device for x in given if not (x.device == CPU and x.ndim == 0)}
    if name in INDEXED:
        places = {x.device for x in given if x is args[0] or x.device != CPU}
    if name.endswith("copy_"):
        places = {args[0].device}
    if len(places) > 1:
        raise RuntimeError(f"{name}: expected all tensors on the same device, got {places}")
    place = wanted or next(iter(places), CPU)
    MOVES.extend((x.device, place, x.shape) for x in given if x.device not in (CPU, place))
    plain = tree_map(lambda x: x.inner if isinstance(x, Placed) else x, (args, kwargs))
    out = func(*plain[0], **plain[1])
    if args and isinstance(args[0], Placed) and name.endswith("_") and out is args[0].inner:
        return args[0]
    if place == CPU:
        return out
    return tree_map(lambda x: Placed(x, place) if isinstance(x, Tensor) else x, out)


class _Devices(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


_of = RowsHandle.of


def _handle(*args: object) -> RowsHandle:
    """A handle has no numbers: it is a tensor of the meta device itself."""
    with _disable_current_modes():
        return _of(*args)


@contextmanager
def devices() -> Iterator[None]:
    """Let tensors be made on devices that there are none of."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor() fills a tensor of the CPU first.
    try:
        with mock.patch.object(RowsHandle, "of", _handle), _Devices():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def spread(model: PreTrainedModel, over: tuple[str, str]) -> PreTrainedModel:
    """Put the second half of a decoder's layers on another device, as ``device_map`` does."""
    layers = model.get_decoder().layers
    first, second = map(torch.device, over)
    _place(model, first)
    for layer in layers[len(layers) // 2 :]:
        _place(layer, second)
        layer.register_forward_pre_hook(_to(second), with_kwargs=True)
    layers[-1].register_forward_hook(lambda m, _, out: _moved(out, first))
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            kind = type(module)
            module.__class__ = type(kind.__name__, (kind,), {"forward": _unheard(kind.forward)})
    return model


def _unheard(function: Callable) -> Callable:
    """Let what the function copies not be in ``MOVES``."""

    @wraps(function)
    def called(*args: object, **kwargs: object) -> object:
        before = len(MOVES)
        out = function(*args, **kwargs)
        del MOVES[before:]
        return out

    return called


def _place(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, x in table.items():
                if x is not None:
                    inner = x.inner if isinstance(x, Placed) else x.data
                    placed = Placed(inner, device)
                    table[name] = nn.Parameter(placed) if isinstance(x, nn.Parameter) else placed


def _to(device: torch.device):
    return lambda m, args, kwargs: (_moved(args, device), _moved(kwargs, device))


def _moved(x: object, device: torch.device) -> object:
    """Copy a part of what a layer is given or gives; the model does so, and no press."""
    return _unheard(tree_map)(lambda t: t.to(device) if isinstance(t, Tensor) else t, x)
