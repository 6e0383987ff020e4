"""Models that compute in float64 throughout, so that laws about algebra hold to 1e-9.

transformers computes norms, rotary embeddings, the softmax of eager attention, the routers of
experts and linear attention in float32, whatever type a model has. ``exact`` gives a model class
without that: its module once more, with float64 in the place of float32 wherever the source
names it. ``tests/test_exact.py`` finds by running whether a float32 number is left.
"""

import ast
import copy
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

CASTS = {"float32": "float64", "float": "float64"}
"""Names in ``torch`` that are taken for another: every cast of transformers but ``.float()``."""
METHODS = {"float": "double"}
"""Methods of tensors that are taken for another."""
WHOLE = {"_experts_implementation": "eager"}
"""Options of a model that are set, because what is chosen without them knows no float64."""


class _Widened(ast.NodeTransformer):
    """Puts float64 in the place of float32."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
        if of_torch and node.attr in CASTS:
            node.attr = CASTS[node.attr]
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Attribute) and not node.args and function.attr in METHODS:
            function.attr = METHODS[function.attr]
        return node


@cache
def _module(name: str) -> ModuleType:
    """A module of transformers in float64, under a name of its own."""
    original = sys.modules[name]
    spec = importlib.util.spec_from_loader(f"{name}_exact", loader=None, origin=original.__file__)
    module = importlib.util.module_from_spec(spec)
    module.__package__, module.__file__ = original.__package__, original.__file__
    tree = _Widened().visit(ast.parse(inspect.getsource(original)))
    sys.modules[module.__name__] = module  # Where models look for their attention function.
    exec(compile(ast.fix_missing_locations(tree), original.__file__, "exec"), vars(module))
    return module


def exact(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The model class in float64; models of it have to be made ``double()`` besides."""
    return getattr(_module(kind.__module__), kind.__name__)


def doubled(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that computes in float64."""
    copied = exact(type(model))(type(model.config).from_dict(model.config.to_dict())).double()
    copied.load_state_dict(model.state_dict())
    for part in (copied.config, getattr(copied.config, "text_config", copied.config)):
        for name, value in WHOLE.items():
            if hasattr(part, name):
                setattr(part, name, value)
    copied.generation_config = copy.deepcopy(model.generation_config)
    return copied.eval()


class _Narrow(TorchDispatchMode):
    """Records every operation that makes numbers of less than float64."""

    def __init__(self, of_float64: bool) -> None:
        super().__init__()
        self.of_float64 = of_float64
        self.found: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x.dtype for x in args if isinstance(x, Tensor)]
        if self.of_float64 and torch.float64 not in given:
            return out
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
                self.found.add((str(func), _caller()))
        return out


def _caller() -> str:
    """The nearest line outside of torch, as ``file:line``."""
    frame = sys._getframe(2)
    while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('site-packages/', 1)[-1]}:{frame.f_lineno}"


@contextmanager
def narrow(of_float64: bool = False) -> Iterator[set[tuple[str, str]]]:
    """What is computed in less than float64 within the block: operations, and from where.

    With ``of_float64`` only what is made of float64: where a number loses what it had.
    """
    mode = _Narrow(of_float64)
    with mode:
        yield mode.found
