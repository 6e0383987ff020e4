"""Tells, in a moment, whether a model is still the one that was recorded."""

from collections.abc import Iterator
from operator import is_

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_OF_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")
"""What a layer with adapters goes by in its forward."""


class Unchanged:
    """A model's parts, weights and switches as they are now, to be compared with those of later.

    Lists of what to look at are made once: walking through a model takes as long as a step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._parts = [x for m in self._modules for x in m._modules.values()]
        self._weights = list(_weights(self._modules))
        self._addresses = [x.data_ptr() for x in self._weights]
        self._adapted = [m for m in self._modules if hasattr(m, _OF_ADAPTERS[0])]
        self._switches = list(_switches(self._adapted))

    def holds(self) -> bool:
        """Tell whether nothing was replaced, switched, or hooked since."""
        parts = [x for m in self._modules for x in m._modules.values()]
        weights = list(_weights(self._modules))
        return (
            _same(parts, self._parts)
            and _same(weights, self._weights)
            and [x.data_ptr() for x in weights] == self._addresses
            and list(_switches(self._adapted)) == self._switches
            and is_plain(self._modules)
        )


def is_plain(modules: list[nn.Module]) -> bool:
    """Tell whether nothing but a model itself acts on its forward: no hook, autocast, training.

    Hooks would not be heard in a replay, and weights that are brought from elsewhere not be there.
    """
    everywhere = torch_module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return False
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return False
    return not any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m.training
        or m._compiled_call_impl is not None
        or "_hf_hook" in m.__dict__
        for m in modules
    )


def _weights(modules: list[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        for of in (module._parameters, module._buffers):
            yield from (x for x in of.values() if x is not None)


def _switches(modules: list[nn.Module]) -> Iterator[object]:
    for module in modules:
        yield tuple(repr(getattr(module, name, None)) for name in _OF_ADAPTERS)


def _same(ours: list, others: list) -> bool:
    return len(ours) == len(others) and all(map(is_, ours, others))
