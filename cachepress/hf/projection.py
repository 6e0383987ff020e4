"""Finds a layer's output projection, and proves that its input is the output of attention.

Models give the projection various names and may put a gate or a norm before it. Instead of trusting
a name, the projection is the submodule that could take attention's output and has not run yet, and
it is proven when it runs.
"""

import torch
from torch import Tensor, nn

from cachepress.errors import UnsupportedError


class Projections:
    """Finds the output projections of the attention modules of one model.

    A layer is compressed right after attention, before its output projection runs: so the
    projection is the one submodule with fitting weights that has not run yet in this forward. When
    it does run, its input must be attention's output, bit for bit; a layer with a gate or a norm in
    between is refused.

    Args:
        remember: whether matrices that had to be computed are held, for models that run many times
            before their layers are compressed.
    """

    def __init__(self, remember: bool = False) -> None:
        self._remember = remember
        self._weights: dict[nn.Module, Tensor] = {}
        self._expected: dict[nn.Module, Tensor] = {}

    def anew(self) -> "Projections":
        """Those of another forward."""
        return Projections(self._remember)

    def find(
        self, attention: nn.Module, done: list[nn.Module], heads: int, output: Tensor
    ) -> Tensor | None:
        """Find the projection ``[H, G, E, M]``; None if there is no single fitting submodule.

        Args:
            attention: the attention module.
            done: its submodules that ran already in this forward.
            heads: number of KV heads.
            output: ``[B, n, H * G, E]`` as attention computed it.
        """
        width, e = output.shape[-2] * output.shape[-1], output.shape[-1]
        fitting = [m for m in attention.children() if m not in done and _takes(m, width)]
        if len(fitting) != 1:
            return None
        module = fitting[0]
        self._expected[module] = output.detach().flatten(-2)
        weight = self._weights.get(module)
        weight = _matrix(module, width, output) if weight is None else weight
        if self._remember:
            self._weights[module] = weight
        return weight.unflatten(0, (heads, -1, e))

    def verify(self, module: nn.Module, args: tuple[object, ...], kwargs: object) -> None:
        """Raise UnsupportedError unless a projection's input is the output of attention."""
        expected = self._expected.pop(module, None)
        if expected is None:
            return
        given = args[0] if args else None
        if (
            isinstance(given, Tensor)
            and given.numel() == expected.numel()
            and _equal(given.detach().reshape(expected.shape), expected)
        ):
            return
        raise UnsupportedError(
            "the output projection does not take what attention gave, but something made from it "
            "(a gate or a norm): presses that need the output projection cannot be used here"
        )

    def end_forward(self) -> None:
        """Forget the inputs that were expected in the forward."""
        self._expected.clear()


def _equal(given: Tensor, expected: Tensor) -> bool:
    same = (given.data_ptr(), given.stride()) == (expected.data_ptr(), expected.stride())
    if same and given.dtype == expected.dtype and given.device == expected.device:
        return True  # The same memory, as almost always: nothing has to be compared.
    return torch.allclose(given, expected, rtol=0, atol=0, equal_nan=True)


def _takes(module: nn.Module, width: int) -> bool:
    """Tell whether a module is linear and takes vectors of a width.

    Linear modules of quantised models say so, and pack their weights in forms of their own.
    """
    if isinstance(n := getattr(module, "in_features", None), int):
        return n == width
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and width in weight.shape


def _matrix(module: nn.Module, width: int, like: Tensor) -> Tensor:
    """Compute the matrix ``[width, M]`` of a linear module from its outputs for unit vectors.

    That is right for quantized and adapted weights too, whatever their layout. Of a module that is
    certainly no more than a matrix it is the module's own, which takes no memory.
    """
    dtype, weight = like.dtype, getattr(module, "weight", None)
    if type(module) is nn.Linear and type(weight) is nn.Parameter and "forward" not in vars(module):
        return weight.detach().T
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1:
        dtype = weight.dtype  # Attention under autocast gives another type.
    with torch.no_grad():
        units = torch.eye(width, dtype=dtype, device=like.device)
        nothing = torch.zeros(1, width, dtype=dtype, device=like.device)
        return module.forward(units) - module.forward(nothing)
