"""One recorded step of a model: static inputs, tables on the device, and a CUDA graph."""

from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from types import MethodType
from typing import NamedTuple, cast
from weakref import WeakMethod, ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from cachepress.cache.kernel import can_compute
from cachepress.cache.layer import CompressedLayer
from cachepress.cache.masks import TextMask
from cachepress.cache.stepping import (
    PartForm,
    count_appended,
    forms_of,
    make_room,
    parts_of,
    plan_of_part,
    storage_of,
    with_token,
)
from cachepress.hf.around import Call, Method
from cachepress.hf.step_cache import step_cache
from cachepress.hf.types import PreTrainedModel
from cachepress.hf.unchanged import Unchanged
from cachepress.hf.watching import close
from cachepress.ops import AttentionRule
from cachepress.ops.paged_attention.plan import MOST_SPLITS, WORDS, RecordedPlan, UnplannedError
from cachepress.settings import is_compiled

_COLUMNS = 1024
"""Text columns of a mask are recorded for a multiple of this."""
_LOWEST = torch.finfo(torch.float32).min
_ELSEWHERE = 5
"""What is recorded is told that the text is longer by this. A model whose numbers depend on it in
other ways than by positions and keys gives something else, and is found out."""


class UnrecordableError(Exception):
    """Says why a step cannot be recorded."""


class Asked(NamedTuple):
    """A forward of one token that can be recorded, as far as its arguments go.

    Attributes:
        ids: ``[B, 1]`` the tokens.
        positions: ``[B, 1]``; None for the number of tokens seen.
        mask: ``[B, S]``, which text columns can be attended to; None for all.
        cache: the cache.
        cache_name: the argument that it came by.
        options: what else the forward is given.
    """

    ids: Tensor
    positions: Tensor | None
    mask: Tensor | None
    cache: Cache
    cache_name: str
    options: tuple[tuple[str, object], ...]


class Form(NamedTuple):
    """What a recording is made for: all steps of one form replay the same recording.

    Attributes:
        batch: sequences.
        columns: room for text columns of a mask; 0 without one.
        options: what else the forward is given.
        function: the model's own attention function.
        layers: what of the storage of each layer's parts matters.
        compiled: whether the model is compiled before.
    """

    batch: int
    columns: int
    options: tuple[tuple[str, object], ...]
    function: str
    layers: tuple[tuple[PartForm, ...], ...]
    compiled: bool

    @classmethod
    def of(cls, model: nn.Module, asked: Asked) -> "Form | None":
        """Return the form of a step; None where it cannot be recorded, or not yet."""
        layers = asked.cache.layers
        if not make_room(layers):
            return None
        try:
            forms = forms_of(layers)
        except UnplannedError:
            return None
        name = str.__str__(cast(PreTrainedModel, model).config._attn_implementation or "eager")
        return cls(len(asked.ids), _columns(asked), asked.options, name, forms, is_compiled())


class _Token(NamedTuple):
    """A token of some sequences: its queries, keys and values, and the layer's rule."""

    query: Tensor
    keys: Tensor
    values: Tensor
    rule: AttentionRule


class Recording:
    """A step that was recorded, and is replayed for any cache of its form.

    Args:
        call: the forward.
        asked: its arguments.
        form: what it is recorded for.
    """

    def __init__(self, call: Call, asked: Asked, form: Form) -> None:
        self._method, self._form = _method(call, form.compiled), form
        self._unchanged = Unchanged(call.module)
        self._rounding = torch.finfo(cast(PreTrainedModel, call.module).dtype).eps ** 0.5
        device, n_parts = asked.ids.device, sum(map(len, form.layers))
        with torch.inference_mode(False):
            self._ids, self._positions = (torch.zeros_like(asked.ids) for _ in range(2))
            self._tables = torch.zeros(n_parts, WORDS, dtype=torch.int64, device=device)
            self._added = torch.zeros(1, dtype=torch.int32, device=device)
            self._mask = torch.zeros(form.batch, 1, form.columns, device=device)
        self._storage: list[tuple[object, ...]] = []
        self._bound: Callable[[], Cache | None] = _nothing
        self._since = self._seen = 0
        self._parts: list[tuple[CompressedLayer, ...]] = []
        self._given_mask: Tensor | None = None
        seen = asked.cache.get_seq_length() + _ELSEWHERE
        windows = [parts[0].kernel.window for parts in form.layers]
        self._cache = step_cache(windows, form.batch, seen, self._attend)
        self._given = {asked.cache_name: self._cache, **dict(asked.options)}
        self._output: ModelOutput | None = None
        self._replay: Callable[[], object] = self._counted

    def serves(self, asked: Asked) -> bool:
        """Tell whether this is a further step of the cache that the last one was for."""
        return (
            self._bound() is asked.cache
            and asked.cache.get_seq_length() == self._seen
            and asked.options == self._form.options
            and _columns(asked) == self._form.columns
            and make_room(asked.cache.layers)
            and self.holds()
            and self._finds(asked.cache)
        )

    def _finds(self, cache: Cache) -> bool:
        """Find the parts of a cache, and tell whether their pairs are where the tables say."""
        self._parts = parts_of(cache.layers)
        if self._storage == [storage_of(part) for part in chain(*self._parts)]:
            return True
        self._parts = []  # Nothing of the cache stays here.
        return False

    def holds(self) -> bool:
        """Tell whether the model is still the one that was recorded."""
        return self._unchanged.holds()

    def bind(self, cache: Cache) -> None:
        """Write down in the tables where the pairs of a cache are, which steps are for from now."""
        self._parts = parts_of(cache.layers)
        parts = list(chain(*self._parts))
        found = [plan_of_part(part) for part in parts]
        if len({since for _, since in found}) > 1:
            for part in parts:
                part.snapshot.plans.forget()
            found = [plan_of_part(part) for part in parts]
        words = torch.tensor([plan.words for plan, _ in found], dtype=torch.int64)
        words = words.pin_memory() if self._tables.is_cuda else words
        self._tables.copy_(words, non_blocking=True)
        self._since = found[0][1]
        self._added.fill_(self._since)
        self._bound, self._seen = ref(cache), cache.get_seq_length()
        self._storage = [storage_of(part) for part in parts]

    def first(self, asked: Asked) -> ModelOutput:
        """Record the step, and return what it gives, without counting its token."""
        self.bind(asked.cache)
        self._write(asked)
        if self._tables.is_cuda:
            self._capture()
            self._replay()
            replayed = self._copied(asked.cache)
            self._added.fill_(self._since)
            self._run()
            if not _equal(replayed, self._copied(asked.cache)):
                raise UnrecordableError("a replay gives something else than the step itself")
        else:
            self._run()
            replayed = self._copied(asked.cache)
        # The token is counted where the forward runs as it is, and tables are written after that.
        self._bound, self._parts = _nothing, []
        return replayed

    def same(self, recorded: ModelOutput, output: object) -> bool:
        """Tell whether a forward that ran as it is gave the same, but for rounding."""
        if type(output) is not type(recorded):
            return False
        found = cast(ModelOutput, output)
        pairs = [(x, found.get(name)) for name, x in recorded.items() if isinstance(x, Tensor)]
        return all(isinstance(y, Tensor) and close(x, y, self._rounding) for x, y in pairs)

    def step(self, asked: Asked) -> ModelOutput:
        """Replay the step for a token of the cache that it is bound to, and count the token.

        Nothing is asked of the device.
        """
        self._write(asked)
        self._replay()
        count_appended(asked.cache.layers, self._parts)
        self._seen += 1
        self._parts = []  # Nothing of the cache stays here.
        return self._copied(asked.cache)

    def _write(self, asked: Asked) -> None:
        """Write the inputs of a step."""
        seen = self._seen
        self._ids.copy_(asked.ids)
        if asked.positions is None:
            self._positions.fill_(seen)
        else:
            self._positions.copy_(asked.positions)
        self._given_mask = asked.mask
        if asked.mask is not None:
            self._mask[:, 0, : seen + 1] = torch.where(asked.mask.bool(), 0.0, _LOWEST)

    def _run(self) -> None:
        """Run the model on the static inputs."""
        with torch.no_grad():
            output = self._method()(
                input_ids=self._ids, position_ids=self._positions, use_cache=True, **self._given
            )
        if not isinstance(output, ModelOutput):
            raise UnrecordableError(f"the forward returns a {type(output).__name__}")
        self._output = output

    def _capture(self) -> None:
        """Record the step on the device, after it ran twice for what is made at first use."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = {"pool": _pool(self._tables.device)}
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **pool):  # pyright: ignore
            self._counted()
        self._replay = graph.replay

    def _counted(self) -> None:
        """Run the step, and count its token on the device."""
        self._run()
        self._added.add_(1)

    def _attend(
        self, index: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule
    ) -> Tensor:
        """Append a token of a layer, and attend, one part of the batch after the other."""
        first, outputs = 0, []
        for i, form in enumerate(self._form.layers[index]):
            some = slice(first, first + form.batch)
            token = _Token(query[some], keys[some], values[some], rule)
            if reads_tables(query):
                place = sum(map(len, self._form.layers[:index])) + i
                outputs.append(self._launched(form, self._tables[place], some, token))
            else:
                held = with_token(self._parts[index][i], token.keys, token.values)
                mask = TextMask(self._given_mask, 1).of_sequences(some.start, some.stop)
                outputs.append(held.attend(token.query, mask, rule))
            first = some.stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _launched(self, form: PartForm, table: Tensor, some: slice, token: _Token) -> Tensor:
        """Append a token of some sequences, and attend, where a table says that their pairs are."""
        if not can_compute(token.query.dtype):
            raise UnrecordableError("the kernel needs Triton, and has no float64")
        if token.query.shape[1] != form.heads * form.queries:
            raise UnrecordableError("its layers differ in their number of attention heads")
        from cachepress.ops.paged_attention.triton import NewToken, triton_attention

        return triton_attention(
            token.query,
            RecordedPlan(table, form.kernel, form.programs, form.partials, MOST_SPLITS),
            token.rule,
            form.heads,
            form.width,
            self._added,
            bias=self._mask[some] if self._mask.shape[2] else None,
            new=NewToken(token.keys, token.values),
        )

    def _copied(self, cache: Cache) -> ModelOutput:
        """Copy what the step gave, with the caller's cache in place of the stand-in."""
        assert self._output is not None
        given = {
            name: cache if x is self._cache else x.clone() if isinstance(x, Tensor) else x
            for name, x in self._output.items()
        }
        return type(self._output)(**given)


def reads_tables(query: Tensor) -> bool:
    """Tell whether a recorded step finds pairs by the tables: by what the host knows, otherwise."""
    return query.is_cuda


def _method(call: Call, compiled: bool) -> Callable[[], Method]:
    """Return the method of a call, compiled or not, without keeping its module alive."""
    if not isinstance(call.method, MethodType):
        return lambda: call.method
    method = cast(Callable[[], MethodType], WeakMethod(call.method))
    if not compiled:
        return method
    function = torch.compile(call.method.__func__, fullgraph=True)
    return lambda: MethodType(cast(Method, function), method().__self__)


def _nothing() -> None:
    """Return None, as a weak reference to a deleted object does."""


def _columns(asked: Asked) -> int:
    return 0 if asked.mask is None else -(-asked.mask.shape[1] // _COLUMNS) * _COLUMNS


def _equal(one: ModelOutput, other: ModelOutput) -> bool:
    return all(torch.equal(x, other[name]) for name, x in one.items() if isinstance(x, Tensor))


@lru_cache
def _pool(device: torch.device) -> object:
    """Return the memory that all recordings on a device share."""
    with torch.cuda.device(device):
        return torch.cuda.graph_pool_handle()
