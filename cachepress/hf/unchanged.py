"""Tells, in a moment, whether a model is still the one that was recorded."""

from collections.abc import Iterator
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_OF_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")


class Unchanged:
    """A model's parts, weights and switches as they are now, to be compared with those of later.

    Lists of what to look at are made once: walking through a model takes as long as a step. The
    model is not kept alive.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modules = [ref(module) for module in modules]
        self._parts = [ref(part) for part in _parts(modules)]
        self._weights = [(ref(x), x.data_ptr()) for x in _weights(modules)]
        self._switches = list(_switches(modules))

    def holds(self) -> bool:
        """Tell whether nothing was replaced, switched, or hooked since."""
        modules = [module for of in self._modules if (module := of()) is not None]
        return (
            len(modules) == len(self._modules)
            and _same(list(_parts(modules)), self._parts)
            and self._same_weights(list(_weights(modules)))
            and list(_switches(modules)) == self._switches
            and is_plain(modules)
        )

    def _same_weights(self, weights: list[Tensor]) -> bool:
        pairs = zip(weights, self._weights, strict=False)
        return len(weights) == len(self._weights) and all(
            of() is x and x.data_ptr() == address for x, (of, address) in pairs
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


def _parts(modules: list[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        yield from (x for x in module._modules.values() if x is not None)


def _weights(modules: list[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        for of in (module._parameters, module._buffers):
            yield from (x for x in of.values() if x is not None)


def _switches(modules: list[nn.Module]) -> Iterator[object]:
    """List what layers with adapters go by in their forward."""
    for module in modules:
        if "_active_adapter" in module.__dict__:
            yield repr([getattr(module, name, None) for name in _OF_ADAPTERS])


def _same(ours: list[nn.Module], others: list[ref[nn.Module]]) -> bool:
    return len(ours) == len(others) and all(of() is x for x, of in zip(ours, others, strict=True))
