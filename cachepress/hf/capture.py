"""Captures, by module hooks, what presses need of a forward that attention itself is not given."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from cachepress.call import AttentionCall
from cachepress.errors import UnsupportedError
from cachepress.hf.projection import Projections
from cachepress.hf.rotary import CosSin, find_rotary
from cachepress.hf.wiring import attention_modules, rotary_modules, text_decoder
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
        self._rotary_modules: list[CosSin] = []
        self._outputs: dict[nn.Module, dict[nn.Module, Tensor]] = {}
        self._hidden: dict[nn.Module, Tensor] = {}
        self._projections = Projections()

    def hook(self) -> list[RemovableHandle]:
        """Register the module hooks that the presses need; the handles remove them."""
        hooks: list[RemovableHandle] = []
        if self._rotates:
            self._rotary_modules = rotary_modules(self._decoder)
        for module in attention_modules(self._decoder):
            if self._reads_hidden:
                hooks.append(module.register_forward_pre_hook(self._keep_hidden, with_kwargs=True))
            if self._rotates or self._projects:
                keep = partial(self._keep_output, module)
                hooks += [child.register_forward_hook(keep) for child in module.children()]
            if self._projects:
                verify = self._projections.verify
                hooks += [child.register_forward_pre_hook(verify) for child in module.children()]
        return hooks

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Register the module hooks, and remove them at the end."""
        hooks = self.hook()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.clear()

    def clear(self) -> None:
        """Forget what was captured of the forward."""
        self._outputs.clear()
        self._hidden.clear()
        self._projections.end_forward()

    def rotary(self, call: AttentionCall) -> Rotary:
        """Find the position embedding of a layer, proven on the keys of the forward."""
        outputs, query = list(self._outputs.get(call.module, {}).values()), call.query
        assert call.key is not None and call.key.snapshot.tail is not None
        new_keys = call.key.snapshot.tail.keys[:, :, -query.shape[2] :]
        found = find_rotary(
            self._rotary_modules, outputs, query.shape[1], new_keys, call.place.rope
        )
        if found is None:
            raise UnsupportedError(
                f"{self._who} needs the position embedding of layer {call.place.layer} of "
                f"{type(self._model).__name__}, which could not be verified: use a press "
                "that does not need it, such as KnormPress or SnapKVPress"
            )
        return found

    def projection(self, call: AttentionCall) -> Tensor:
        """Find the output projection ``[H, G, E, M]`` of a layer."""
        done = list(self._outputs.get(call.module, {}))
        found = self._projections.find(call.module, done, call.pairs.keys.shape[1], call.output)
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
            self._outputs.setdefault(attention, {})[module] = output.detach()
