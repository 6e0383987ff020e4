"""Cosines and sines of positions, as the rotary modules of a model compute them in one forward.

Modules differ in what they take (a layer type besides) and in what they give (cosine and sine, or
one complex number). Some choose their frequencies by the last position of a forward (longrope), or
by the longest text that they have read (dynamic NTK), so that the same position is not always
rotated by the same angle.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cachepress.hf.hooks import Hooks, unhooked
from cachepress.hf.rotary import NOT_OF_TEXT

_LAST: ContextVar[int | None] = ContextVar("last position of a prompt", default=None)
"""The position that a prompt read in chunks ends at, while a thread or task reads one."""


@dataclass(frozen=True)
class RotaryModule:
    """A rotary module of a model, for one layer type where it knows several."""

    module: nn.Module
    layer_type: str | None = None

    def at(self, last: Tensor) -> "Angles":
        """Return the angles of a forward that ran just now and ended at the position ``last``."""
        return Angles(self, _copied(self.module), last)

    def changes(self, first: Tensor, last: Tensor) -> bool:
        """Tell whether a forward that ends at ``last`` rotates positions up to ``first`` otherwise.

        Otherwise than a forward that ends at ``first``, that is.
        """
        x = torch.zeros(1, 1, 1, device=first.device)
        positions = (torch.linspace(0, 1, 8, device=first.device) * first).long()[None]
        try:
            found = [self._first_forward(end)(x, positions) for end in (first, last)]
        except NOT_OF_TEXT:
            return False
        return not all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def _first_forward(self, last: Tensor) -> "Angles":
        """Return the angles of a model that reads its first text, which ends at ``last``."""
        module = _copied(self.module)
        start = torch.zeros(1, 1, dtype=torch.long, device=last.device)
        # A text of one token: modules that remember the longest one forget it then.
        _called(module, self.layer_type, torch.zeros(1, 1, 1, device=last.device), start)
        return Angles(self, module, last)


@dataclass(frozen=True, eq=False)
class Angles:
    """Cosines and sines as a rotary module gave them in one forward, whatever it is given later.

    Attributes:
        source: the module.
        module: a copy of it, with the state that it had.
        last: the highest position of the forward, which frequencies may depend on.
    """

    source: RotaryModule
    module: nn.Module
    last: Tensor

    def __call__(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cosine and sine ``[B, n, r]`` of ``positions [B, n]``."""
        last = self.last.to(positions).expand(len(positions), 1)
        shown = torch.cat([positions, last], dim=1)
        cos, sin = _called(_copied(self.module), self.source.layer_type, x, shown)
        return cos[:, :-1], sin[:, :-1]


def rotary_modules(decoder: PreTrainedModel) -> list[RotaryModule]:
    """List the rotary modules of a decoder, once for each layer type that they know."""
    kinds = dict.fromkeys([*(getattr(decoder.config, "layer_types", None) or ()), "full_attention"])
    found = []
    for module in decoder.modules():
        parameters = _parameters(type(module))
        if list(parameters)[1:3] != ["x", "position_ids"]:
            continue
        told = parameters.get("layer_type")
        if told is None or told.default is None:
            found.append(RotaryModule(module))
        if told is not None:
            named = getattr(module, "rope_type", None)
            own = dict.fromkeys(named) if isinstance(named, Mapping) else {}
            found += [RotaryModule(module, cast(str, kind)) for kind in {**own, **kinds}]
    return found


@lru_cache
def _parameters(kind: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.forward).parameters


def last_position(rope: Tensor) -> Tensor:
    """Return the highest position that the rotary modules were shown in a forward of ``rope``."""
    last = _LAST.get()
    return rope.amax() if last is None else rope.amax().clamp(min=last)


@contextmanager
def as_one_forward(decoder: PreTrainedModel, first: int, last: int) -> Iterator[None]:
    """Rotate the tokens of a prompt that is read in chunks as one forward would.

    Where a module chooses its frequencies by the length of a text, it is shown the prompt's last
    position together with those of each chunk. No other module is touched.

    Args:
        decoder: the decoder that reads the prompt.
        first: the highest position of the first chunk.
        last: that of the prompt.
    """
    ends = [torch.tensor(end, device=decoder.device) for end in (first, last)]
    modules = rotary_modules(decoder) if first < last else []
    changing = {found.module for found in modules if found.changes(*ends)}
    before = _LAST.set(last if changing else None)
    try:
        with Hooks() as hooks:
            for module in changing:
                hooks.before(module, _show_last)
                hooks.after(module, _hide_last)
            yield
    finally:
        _LAST.reset(before)


@contextmanager
def rotary_state_kept(decoder: PreTrainedModel) -> Iterator[None]:
    """Put back what rotary modules remember of the texts that they read within the block."""
    modules = {found.module for found in rotary_modules(decoder)}
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).update(attributes)
            module._buffers.update(buffers)


def _show_last(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    last = _LAST.get()
    if last is None:
        return None
    named = "position_ids" in kwargs
    positions = cast(Tensor, kwargs["position_ids"] if named else args[1])
    shown = torch.cat([positions, positions.new_full((*positions.shape[:-1], 1), last)], dim=-1)
    if named:
        return args, {**kwargs, "position_ids": shown}
    return (args[0], shown, *args[2:]), kwargs


def _hide_last(module: nn.Module, args: object, output: object) -> object:
    if _LAST.get() is None:
        return None
    if isinstance(output, Tensor):
        return output[..., :-1, :]
    return tuple(x[..., :-1, :] for x in cast(tuple[Tensor, ...], output))


def _copied(module: nn.Module) -> nn.Module:
    """Copy a rotary module with its state, but without hooks: some write to it when called."""
    copied = unhooked(module)
    state = vars(copied)
    for name, x in list(state.items()):
        if isinstance(x, Tensor):
            state[name] = x.clone()
    state["_buffers"] = {k: None if x is None else x.clone() for k, x in module._buffers.items()}
    return copied


def _called(
    module: nn.Module, layer_type: str | None, x: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine ``[B, n, r]``, whichever way the module gives them."""
    given = (x, positions) if layer_type is None else (x, positions, layer_type)
    # The class's own function, because what is put over that of the module acts on the module.
    found = type(module).forward(module, *given)
    cos, sin = (found.real, found.imag) if isinstance(found, Tensor) else found
    if cos.ndim != 3 or cos.shape[1] != positions.shape[1]:
        raise ValueError(f"got cosines of shape {tuple(cos.shape)}, wanted [B, n, r]")
    return cos, sin
