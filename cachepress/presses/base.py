"""What a press is: a frozen set of answers to the engine's questions."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cachepress.artefacts import locate_artefact
from cachepress.budgets import (
    Amount,
    Bytes,
    Fixed,
    Ratio,
    Threshold,
    TopK,
    check_ratio,
    parse_bytes,
)
from cachepress.cache.codec import Codec
from cachepress.core import Schedule, Step
from cachepress.errors import CachepressError
from cachepress.files import real_path
from cachepress.hf import Observation
from cachepress.limits import (
    MOST_BYTES,
    MOST_SEED,
    MOST_TOKENS,
    check_whole,
    is_whole,
    shown,
)
from cachepress.ops import wide_dtype
from cachepress.reconstruction import Reconstruction, ReconstructionView
from cachepress.schedules import AfterPrefill
from cachepress.view import LayerView, Needs

T = TypeVar("T")


class BasePress:
    """A method of compression, as frozen data.

    Subclasses are frozen dataclasses: ``repr(press)`` is the press's spelling and
    ``cachepress.parse`` reads it back. ``class MyPress(ScorerPress, alias="my")`` gives a press a
    short name besides.

    Attributes:
        alias: the short name; None for none.
    """

    alias: ClassVar[str | None] = None

    def __init_subclass__(cls, alias: str | None = None) -> None:
        """Note the alias, and keep dataclasses from writing a ``repr`` of their own."""
        super().__init_subclass__()
        cls.alias = alias
        cls.__repr__ = BasePress.__repr__

    def __repr__(self) -> str:
        """The press's spelling; keyword-only options that were not given are left out."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)  # type: ignore
            if not (field.kw_only and getattr(self, field.name) == field.default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def needs(self) -> Needs:
        """What the scorer wants to see beyond keys, values and positions."""
        return Needs()

    @property
    def budget(self) -> TopK | Threshold:
        """How many rows stay, and who competes for them."""
        raise NotImplementedError(f"{type(self).__name__} has no budget")

    @property
    def schedule(self) -> Schedule:
        """When a layer is settled."""
        return AfterPrefill()

    @property
    def compacts(self) -> bool:
        """Whether kept keys are rotated to positions without gaps."""
        return False

    @property
    def carries(self) -> bool:
        """Whether something is left with each row for the next time: what ``token_state`` gives."""
        return False

    @property
    def rewrites(self) -> bool:
        """Whether rows are stored anew even when none is dropped."""
        return self.carries

    @property
    def buffer(self) -> int:
        """Most decoded queries that are held between two settles."""
        return self.needs.queries

    @property
    def storage(self) -> Codec | None:
        """How kept rows are stored; None for as they are, or as the call says."""
        return None

    def page_budget(self, depth: int) -> int | None:
        """Pages of settled rows that a decoded token reads in each head of a layer; None for all.

        ``depth`` is the rank of the layer among those that are compressed.
        """
        return None

    def score(self, view: LayerView) -> Tensor:
        """Worth of each row, ``[B, H, T]``; the highest are kept."""
        raise NotImplementedError(f"{type(self).__name__} has no score")

    @property
    def reconstruction(self) -> Reconstruction | None:
        """What the model has to repeat before its layers are settled; None for nothing."""
        return None

    def reconstructed(self, view: ReconstructionView) -> Tensor:
        """What a layer showed of each row of a chunk that was repeated, ``[H, chunk]``.

        It is read as ``view.hidden_feature`` when the layer is scored.
        """
        raise NotImplementedError(f"{type(self).__name__} does not replay")

    def token_state(self, view: LayerView) -> Tensor | None:
        """A number to keep with each token until the next compression, ``[B, H, T]``, or None.

        Rows whose score cannot be found again later need it; see ``carries``.
        """
        return None

    def merge(self, view: LayerView, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the rows outside of ``mask [B, H, T]`` leave in the others.

        Returns:
            Keys ``[B, H, T, D]`` and values ``[B, H, T, E]`` to store; None for those that are.
        """
        return None

    def key_channels(self, view: LayerView, mask: Tensor) -> Tensor | None:
        """Which channels of the keys in ``mask [B, H, T]`` are stored, ``[B, H, D]``.

        Every head stores the same number of them. None for all channels.
        """
        return None

    def with_ratio(self, ratio: float) -> Self:
        """The same press at another compression ratio."""
        raise CachepressError(f"{type(self).__name__} has no compression ratio to set")

    def acting(self, step: Step) -> "BasePress":
        """The press that acts in a forward: this one, unless it is made of several."""
        return self

    def check_layers(self, n_layers: int) -> None:
        """Raise if the press does not fit a model with ``n_layers`` compressed layers."""

    @property
    def learned(self) -> Mapping[str, str]:
        """What the press has to know of a model: for each option that names a file, its kind."""
        return {}

    def files(self, model: str) -> Mapping[str, Sequence[Path]]:
        """The files that the press reads for a model of that name, by kind.

        Raises:
            CachepressError: if one is missing.
        """
        return {
            kind: [Path(locate_artefact(kind, getattr(self, option), model))]
            for option, kind in self.learned.items()
        }

    def for_model(self, model: PreTrainedModel) -> "BasePress":
        """The press made ready for a model: what it has to look up is found and checked.

        Called whenever the press is put on a model, before any work is done, so what is costly to
        find has to be remembered.

        Raises:
            CachepressError: if it does not fit the model, or what it needs cannot be found.
        """
        return self

    def __call__(
        self,
        model: PreTrainedModel,
        *,
        turns: str = "all",
        storage: str | Codec = "full",
        question: int | Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> AbstractContextManager[None]:
        """Compress what the model caches inside the ``with`` block.

        Args:
            model: a transformers decoder model.
            turns: "all" settles after every forward of several tokens, "first" after the first.
            storage: how kept rows are stored: "full" for as they are, or as the press says;
                "int8", "int4", "int2", or a ``Codec``. Keys are quantized by channel, values by
                token; the newest 64 rows of a head stay as they are.
            question: tokens at the end of the prompt that are the question, one number or one for
                each sequence; for presses that ask for it.
            tokenizer: for presses that replay; None for the one where the model came from.

        Raises:
            UnsupportedError: if the model's cache cannot be compressed.
        """
        return Observation(self, model, turns, storage, question, tokenizer)


@dataclass(frozen=True, repr=False)
class ScorerPress(BasePress):
    """A press that is a score, with the same budget for every head.

    Attributes:
        compression_ratio: fraction of pairs removed, 0 <= ratio < 1.
        n_kept: instead of a ratio, rows that each head keeps, on average where heads compete.
        max_bytes: instead of a ratio, bytes that the whole compressed cache may allocate, such as
            "1.5GiB".
    """

    compression_ratio: float = 0.0
    n_kept: int | None = field(default=None, kw_only=True)
    max_bytes: int | str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_values(self)
        check_ratio(self.compression_ratio)
        if self.n_kept is not None:
            check_count(self, "n_kept", most=MOST_BYTES)
        if self.max_bytes is not None:
            parse_bytes(self.max_bytes)
        given = [n for n in ("compression_ratio", "n_kept", "max_bytes") if getattr(self, n)]
        if len(given) > 1:
            raise CachepressError(f"got both {given[0]} and {given[1]}: give one budget")

    @property
    def amount(self) -> Amount:
        """Rows that each head keeps."""
        if self.n_kept is not None:
            return Fixed(self.n_kept)
        if self.max_bytes is not None:
            return Bytes(parse_bytes(self.max_bytes))
        return Ratio(self.compression_ratio)

    @property
    def budget(self) -> TopK:
        """The best rows of each head."""
        return TopK(self.amount)

    def with_ratio(self, ratio: float) -> Self:
        """The same press at another compression ratio."""
        return replace(self, compression_ratio=ratio, n_kept=None, max_bytes=None)


@dataclass(frozen=True, repr=False)
class WrapperPress(BasePress):
    """A press around a press: forwards every answer; subclasses override one.

    Attributes:
        press: the inner press.
    """

    press: BasePress

    def __post_init__(self) -> None:
        check_values(self)
        if not isinstance(self.press, BasePress):
            raise CachepressError(
                f"{type(self).__name__} wraps a press: got {shown(self.press)}, wanted for example "
                f"{type(self).__name__}(SnapKVPress(compression_ratio=0.5))"
            )

    @property
    def needs(self) -> Needs:
        """What the inner press needs."""
        return self.press.needs

    @property
    def budget(self) -> TopK | Threshold:
        """The inner press's budget."""
        return self.press.budget

    @property
    def schedule(self) -> Schedule:
        """The inner press's schedule."""
        return self.press.schedule

    @property
    def compacts(self) -> bool:
        """Whether the inner press compacts."""
        return self.press.compacts

    @property
    def carries(self) -> bool:
        """Whether the inner press leaves something with each row."""
        return self.press.carries

    @property
    def rewrites(self) -> bool:
        """Whether the inner press stores rows anew."""
        return self.press.rewrites

    @property
    def buffer(self) -> int:
        """The inner press's buffer."""
        return self.press.buffer

    @property
    def storage(self) -> Codec | None:
        """How the inner press stores rows."""
        return self.press.storage

    def page_budget(self, depth: int) -> int | None:
        """The pages that the inner press reads."""
        return self.press.page_budget(depth)

    @property
    def compression_ratio(self) -> float | None:
        """The inner press's ratio; None where it has another budget."""
        return getattr(self.press, "compression_ratio", None)

    def score(self, view: LayerView) -> Tensor:
        """The inner press's score, ``[B, H, T]``."""
        return self.press.score(view)

    @property
    def reconstruction(self) -> Reconstruction | None:
        """What the inner press wants repeated."""
        return self.press.reconstruction

    def reconstructed(self, view: ReconstructionView) -> Tensor:
        """What the inner press makes of a chunk that was repeated."""
        return self.press.reconstructed(view)

    def token_state(self, view: LayerView) -> Tensor | None:
        """What the inner press leaves with each row."""
        return self.press.token_state(view)

    def merge(self, view: LayerView, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the inner press lets dropped rows leave."""
        return self.press.merge(view, mask)

    def key_channels(self, view: LayerView, mask: Tensor) -> Tensor | None:
        """The channels that the inner press stores."""
        return self.press.key_channels(view, mask)

    def acting(self, step: Step) -> BasePress:
        """The same wrapper around the inner press that acts."""
        acting = self.press.acting(step)
        return self if acting is self.press else replace(self, press=acting)

    def check_layers(self, n_layers: int) -> None:
        """Raise if the inner press does not fit the model."""
        self.press.check_layers(n_layers)

    def for_model(self, model: PreTrainedModel) -> BasePress:
        """The same wrapper around the inner press made ready for a model."""
        ready = self.press.for_model(model)
        return self if ready is self.press else replace(self, press=ready)

    def with_ratio(self, ratio: float) -> Self:
        """The same wrapper around the inner press at another ratio."""
        return replace(self, press=self.press.with_ratio(ratio))


def noted_or_carried(view: LayerView, hidden_feature: Tensor) -> Tensor:
    """What was noted of each row in this turn, ``[B, H, T]``, else what an earlier one left."""
    return (
        hidden_feature
        if view.token_state is None
        else torch.where(hidden_feature.isnan(), view.token_state, hidden_feature)
    )


def unknown_as_average(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores ``[B, H, T]`` in which NaN is the mean of its head's finite scores of valid rows."""
    known = valid & scores.isfinite()
    total = scores.masked_fill(~known, 0).double().sum(-1, keepdim=True)
    average = (total / known.sum(-1, keepdim=True).clamp(min=1)).to(wide_dtype(scores))
    return torch.where(scores.isnan(), average, scores)


def mean_of_token(x: Tensor, view: LayerView) -> Tensor:
    """Mean of ``x [B, H, T]`` over the heads that hold the same token, ``[B, H, T]``.

    Heads that dropped rows in an earlier turn have different tokens in the same place.
    """
    b, h, _ = x.shape
    size = int(view.n_seen.max())
    column = view.index.long().masked_fill(~view.valid, size)

    def by_token(y: Tensor) -> Tensor:
        return y.new_zeros(b, h, size + 1).scatter(-1, column, y).sum(1, keepdim=True)

    mean = by_token(x) / by_token(view.valid.to(x.dtype)).clamp(min=1)
    return mean.expand(-1, h, -1).gather(-1, column)


def reconstructs(press: BasePress) -> bool:
    """Whether a press lets prompts be repeated, at its own ratio or at one that drops something."""
    with suppress(CachepressError):
        press = press.with_ratio(0.5)
    return press.reconstruction is not None


def fill(press: BasePress, values: Mapping[str, object]) -> None:
    """Set the fields of a frozen press whose ``__init__`` is its own, and check them."""
    for own in fields(press):  # type: ignore
        object.__setattr__(press, own.name, values[own.name])
    press.__post_init__()  # type: ignore


def either(name: str, value: T | None, other_name: str, other: T | None) -> T | None:
    """The value of an option that has two names.

    Raises:
        CachepressError: if both are given.
    """
    if value is not None and other is not None:
        raise CachepressError(
            f"got both {name} and {other_name}, which are one option: give {name}"
        )
    return other if value is None else value


def check_values(press: BasePress) -> None:
    """Raise for values that no option takes: flags and names that are none, endless numbers."""
    for f in fields(press):  # type: ignore
        value = getattr(press, f.name)
        if f.type is bool and not isinstance(value, bool):
            raise CachepressError(f"{f.name}: got {shown(value)}, wanted True or False")
        if f.type == str | None and value is not None and not (isinstance(value, str) and value):
            raise CachepressError(
                f"{f.name}: got {shown(value)}, wanted a file, a folder or a name, as a text"
            )
        if isinstance(value, int) and not is_whole(int(value), -MOST_BYTES, MOST_BYTES):
            raise CachepressError(
                f"{f.name}: got {shown(value)}, wanted a number from {-MOST_BYTES} to {MOST_BYTES}"
            )


def check_count(press: BasePress, name: str, least: int = 1, most: int = MOST_TOKENS) -> None:
    """Raise unless the press's field ``name`` is an integer from ``least`` to ``most``."""
    check_whole(name, getattr(press, name), least, MOST_SEED if name == "seed" else most)


def counted(wrapper: WrapperPress) -> TopK:
    """The inner budget of a wrapper that changes how many rows are kept, or who competes.

    Raises:
        CachepressError: if the inner press keeps no number of rows.
    """
    budget = wrapper.press.budget
    if not isinstance(budget, TopK):
        name = type(wrapper).__name__
        raise CachepressError(
            f"{name} changes a number of rows, and {wrapper.press!r} keeps as many as its own rule "
            f"says: wrap a press with a budget, such as {name}(SnapKVPress(0.5))"
        )
    return budget


def check_by_layer(wrapper: WrapperPress) -> None:
    """Raise if a wrapper that chooses layer by layer is around a budget of the whole model."""
    name = type(wrapper).__name__
    if wrapper.press.budget.scope == "model":
        raise CachepressError(
            f'{name} chooses layer by layer and cannot wrap a budget of scope="model": wrap the '
            f'other way round, AdaKVPress({name}(...), scope="model")'
        )


def with_inner(press: BasePress) -> Iterator[BasePress]:
    """A press and every press inside of it."""
    yield press
    for given in fields(press):  # type: ignore
        value = getattr(press, given.name)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, BasePress):
                yield from with_inner(item)


def with_real_paths(press: BasePress) -> BasePress:
    """The same press with every file that it names by its one absolute path."""
    changes: dict[str, object] = {}
    for given in fields(press):  # type: ignore
        value = getattr(press, given.name)
        if given.name in press.learned and isinstance(value, str):
            changes[given.name] = real_path(value)
        elif isinstance(value, BasePress):
            changes[given.name] = with_real_paths(value)
        elif isinstance(value, list | tuple) and any(isinstance(x, BasePress) for x in value):
            items = (with_real_paths(x) if isinstance(x, BasePress) else x for x in value)
            changes[given.name] = type(value)(items)
    changes = {name: x for name, x in changes.items() if x != getattr(press, name)}
    return replace(press, **changes) if changes else press  # type: ignore


def all_presses(base: type[BasePress] = BasePress) -> Iterator[type[BasePress]]:
    """Every press class that is defined in this process."""
    for kind in base.__subclasses__():
        yield kind
        yield from all_presses(kind)
