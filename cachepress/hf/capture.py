"""Captures, by module hooks, what presses need of a forward that attention itself is not given.

Nothing of a layer is held longer than its attention takes: that has the size of activations, and
those of all layers would not fit into memory.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from cachepress.call import AttentionCall
from cachepress.errors import UnsupportedError
from cachepress.hf.hooks import Hooks
from cachepress.hf.projection import Projections
from cachepress.hf.proofs import RotaryProofs
from cachepress.hf.wiring import attention_modules, text_decoder
from cachepress.press import BasePress
from cachepress.view import Rotary


class Capture:
    """Finds the rotary embedding, output projection and hidden states of layers in a forward.

    Args:
        presses: the presses whose needs say what is captured.
        model: the model.
    """

    def __init__(self, presses: Sequence[BasePress], model: PreTrainedModel) -> None:
        needs = [press.needs for press in presses]
        weighs = any(need.weighs for need in needs)
        self._who = ", ".join(map(repr, presses))
        self._model, self._decoder = model, text_decoder(model)
        self._rotates = any(need.rotates for need in needs)
        self._projects = weighs or any(need.projection for need in needs)
        self._reads_hidden = weighs or any(need.hidden is not None for need in needs)
        self._proofs = RotaryProofs(self._who, model) if self._rotates else None
        self._ran: dict[nn.Module, list[nn.Module]] = {}
        self._outputs: dict[nn.Module, dict[nn.Module, Tensor]] = {}
        self._hidden: dict[nn.Module, Tensor] = {}
        self._projections = Projections(remember=weighs)
        captures = self._rotates or self._projects or self._reads_hidden
        self._modules = attention_modules(self._decoder) if captures else []

    def anew(self) -> "Capture":
        """A capture of the same things in another forward."""
        other = copy.copy(self)
        other._ran, other._outputs, other._hidden = {}, {}, {}
        other._projections = self._projections.anew()
        return other

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Capture what a forward of this thread or task does, and forget it at the end."""
        try:
            with Hooks() as hooks:
                for module in self._modules:
                    self._hook(module, hooks)
                yield
        finally:
            self.clear()

    def _hook(self, module: nn.Module, hooks: Hooks) -> None:
        """Register hooks on an attention module and its children."""
        if self._reads_hidden:
            hooks.before(module, self._keep_hidden)
        for child in module.children() if self._rotates or self._projects else ():
            hooks.after(child, partial(self._keep_output, module))
            if self._projects:
                hooks.before(child, self._projections.verify)
        hooks.after(module, self._forget)

    def clear(self) -> None:
        """Forget what was captured of the forward."""
        for captured in (self._ran, self._outputs, self._hidden):
            captured.clear()
        self._projections.end_forward()

    def _forget(self, module: nn.Module, args: object, output: object) -> None:
        """Forget what was captured of an attention module, whose layer is compressed by now."""
        for captured in (self._ran, self._outputs, self._hidden):
            captured.pop(module, None)

    def rotary(self, call: AttentionCall) -> Rotary:
        """Find the position embedding of a layer, proven on all keys that it holds.

        It is asked for once in a forward: what the keys were made of is not held any longer.
        """
        assert self._proofs is not None, "a press uses what its needs do not declare"
        return self._proofs.prove(call, self._outputs.pop(call.module, {}))

    def projection(self, call: AttentionCall) -> Tensor:
        """Find the output projection ``[H, G, E, M]`` of a layer."""
        done, heads = self._ran.get(call.module, []), call.pairs.keys.shape[1]
        found = self._projections.find(call.module, done, heads, call.output)
        if found is None:
            raise UnsupportedError(
                f"{self._who} needs the output projection of each layer of "
                f"{type(self._model).__name__}, and one could not be found: use a press without "
                "it"
            )
        return found

    def hidden(self, call: AttentionCall) -> Tensor | None:
        """Return the hidden states ``[B, n, M]`` that attention was given, if presses need them."""
        if not self._reads_hidden:
            return None
        hidden = self._hidden.pop(call.module, None)
        if hidden is None:
            raise UnsupportedError(
                f"{self._who} needs the hidden states of layer {call.place.layer} of "
                f"{type(self._model).__name__}, which its attention does not take: use a press "
                "that does not need them, such as KnormPress or SnapKVPress"
            )
        return hidden

    def _keep_hidden(
        self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        if isinstance(given, Tensor) and given.ndim == 3:
            self._hidden[module] = given.detach()

    def _keep_output(
        self, attention: nn.Module, module: nn.Module, args: object, output: object
    ) -> None:
        if isinstance(output, Tensor):
            self._ran.setdefault(attention, []).append(module)
            if self._rotates:
                self._outputs.setdefault(attention, {})[module] = output.detach()
