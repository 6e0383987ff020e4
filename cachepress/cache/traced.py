"""Lets torch.compile trace a decoded step without a break: a layer appends and attends in one op.

What a trace sees of a layer are a number, in a tensor, and the operators below; how many tokens the
layer holds changes with each step, and a graph that knew it would be compiled again for the next.
"""

from itertools import count
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from cachepress.cache.handle import TracedHandle
from cachepress.cache.masks import TextMask
from cachepress.cache.protocol import GrowingLayer
from cachepress.ops import AttentionRule

if TYPE_CHECKING:
    from cachepress.cache.snapshot import Snapshot
    from cachepress.call import Hook

_COLUMNS = 1024
"""A graph is told that the text has a multiple of so many columns, more than were seen."""


class Attending(Protocol):
    """What appends a token and attends where a graph has an operator."""

    def get_seq_length(self) -> int:
        """Count the text columns seen."""
        ...

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append the pairs of a forward, and return handles by which attention finds the layer."""
        ...

    def attend_token(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, rule: AttentionRule
    ) -> Tensor:
        """Append a token, and attend for its ``query [B, H * G, 1, D]``, ``[B, 1, H * G, E]``."""
        ...


class Passed(NamedTuple):
    """What a layer's ``update`` passes on to the attention function within a trace.

    Attributes:
        number: the layer's number, a tensor.
        keys: ``[B, H, 1, D]`` keys of the token.
        values: ``[B, H, 1, E]`` its values.
    """

    number: Tensor
    keys: Tensor
    values: Tensor


class _Passing:
    """Holds what is passed on.

    While a graph runs nothing is in it, so that threads do not meet here; only where a graph ends
    between the two, at attention that asks for more than the operator computes, something is.
    """

    passed: Passed | None = None


_PASSING = _Passing()
_NUMBERS = count()
_BY_NUMBER: WeakValueDictionary[int, Attending] = WeakValueDictionary()


class Number:
    """Holds the number of a layer, by which the operators find it.

    It is on the host and has slots, as Python's own numbers are: no part of what a cache stores.

    Attributes:
        tensor: a graph has it as an input, and would be made for one number only. It can be written
            to in every mode.
    """

    __slots__ = ("tensor",)

    def __init__(self, layer: Attending) -> None:
        number = next(_NUMBERS)
        _BY_NUMBER[number] = layer
        with torch.inference_mode(False):
            self.tensor = torch.tensor(number, device="cpu")


def layer_of(number: Tensor) -> Attending:
    """Return the layer of a number."""
    return _BY_NUMBER[int(number)]


def pass_on(number: Number, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Pass a token on to the attention function that is traced next, and return its handles."""
    _PASSING.passed = Passed(number.tensor, keys, values)
    handle = keys.as_subclass(TracedHandle)
    return handle, handle


def take() -> Passed | None:
    """Take what was passed on."""
    passed, _PASSING.passed = _PASSING.passed, None
    return passed


# The number is said to be changed, so that no operator is moved before another one of its layer.
@torch.library.custom_op("cachepress::seen", mutates_args=("number",))
def seen(number: Tensor) -> Tensor:
    """Return the number of text columns that a layer has seen."""
    return torch.tensor(layer_of(number).get_seq_length())


@seen.register_fake
def _(number: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.long)


@torch.library.custom_op("cachepress::attend_token", mutates_args=("number",))
def attend_token(
    number: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Append a token to a layer and attend, ``[B, 1, H * G, E]``."""
    rule = AttentionRule(scaling, softcap, sinks)
    output = layer_of(number).attend_token(query, keys, values, mask, rule)
    # What an operator returns may share no memory with what it was given.
    return output.contiguous()


@attend_token.register_fake
def _(number: Tensor, query: Tensor, keys: Tensor, values: Tensor, *options: object) -> Tensor:
    b, hq, n, _ = query.shape
    return query.new_empty(b, n, hq, values.shape[-1])


class TracedLayer(GrowingLayer):
    """A growing cache layer that torch.compile can trace while tokens are decoded.

    Attributes:
        reads_whole: whether forwards of one token read every page, being parts of a text.
        hook: observes the next attention call of the layer; None for nobody.
    """

    reads_whole: bool
    hook: "Hook | None"
    _seen: int
    _traceable = True

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take the state of another layer, but for its number, as copies and pickles do."""
        vars(self).update(state)
        self.be_numbered()

    def be_numbered(self) -> None:
        """Get a number by which the operators of a graph find this layer."""
        self._number, self._columns = Number(self), _columns(self._seen)

    def _count(self, n: int) -> None:
        """Count ``n`` appended text columns."""
        self._seen += n
        self._columns = _columns(self._seen)

    @property
    def _is_traced(self) -> bool:
        """Whether torch.compile traces a forward that continues the layer, and nothing else."""
        return (
            torch.compiler.is_dynamo_compiling()
            and self._traceable
            and self.hook is None
            and not self.reads_whole
            and self.batch_size > 0
        )

    def get_seq_length(self) -> int:
        """Count the text columns seen, which is the column of the next token.

        A graph is given a tensor, as transformers' static layers give one: it must not depend on
        the number.
        """
        if self._is_traced:
            return seen(self._number.tensor)  # pyright: ignore[reportReturnType]
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the attention mask: the whole text and the new tokens."""
        if self._is_traced and query_length == 1:
            return self._columns, 0
        return self._seen + int(query_length), 0

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the pairs of a forward, and return handles by which attention finds the layer."""
        if self._is_traced and key_states.shape[2] == 1:
            return pass_on(self._number, key_states, value_states)
        return self._update(key_states, value_states)

    def attend_token(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, rule: AttentionRule
    ) -> Tensor:
        """Append a token, and attend for its ``query [B, H * G, 1, D]``, ``[B, 1, H * G, E]``."""
        self._append(keys, values)
        visible = None if mask is None else mask[..., : self._seen]
        return self.snapshot.attend(query, TextMask(visible, 1), rule)

    @property
    def snapshot(self) -> "Snapshot":
        """Snapshot of what the layer holds now, which attention reads."""
        raise NotImplementedError

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append the pairs of a forward, and return handles, where nothing is traced."""
        raise NotImplementedError

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Append the pairs of a forward."""
        raise NotImplementedError


def _columns(n: int) -> int:
    return (n // _COLUMNS + 1) * _COLUMNS
