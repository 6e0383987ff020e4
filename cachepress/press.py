"""The contract of every compression method, as frozen dataclasses.

A press declares what it must observe (``needs``), how many pairs are kept (``budget``) and when
(``schedule``). It scores pairs (``score``), and may merge evicted pairs into kept ones (``merge``),
store fewer key channels (``key_channels``), add a number to the logits of kept pairs
(``pair_bias``) or keep one with each token (``token_state``).
It never touches a cache or a model: ``cachepress.engine`` applies the scores to a layer, and
``cachepress.hf`` finds in transformers what was declared.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn, Self

from torch import Tensor

from cachepress.budgets import Amount, Budget, Bytes, Fixed, Ratio, TopK, check_ratio, parse_bytes
from cachepress.cache.codec import Codec
from cachepress.checks import check_count, check_values
from cachepress.deprecated import Renamed, adopt_renamed
from cachepress.errors import CachepressError
from cachepress.files import real_path
from cachepress.limits import MOST_BYTES
from cachepress.reconstruction import ReconstructionView
from cachepress.schedules import AfterPrefill, Schedule, Step
from cachepress.view import LayerView, Needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class BasePress:
    """A compression method: the base class of all presses.

    Subclasses are frozen dataclasses, so that ``repr(press)`` is text that ``cachepress.parse``
    reads back. ``class MyPress(ScorerPress, alias="my")`` also gives the press a short name.

    Attributes:
        alias: the short name that ``cachepress.parse`` and the command line know; None for none.
    """

    alias: ClassVar[str | None] = None

    carries = Renamed("needs.token_state")
    compacts = Renamed("needs.compaction")
    rewrites = Renamed("needs.always")
    replay = Renamed("needs.reconstruction")
    storage = Renamed("needs.storage")
    buffer = Renamed("needs.most_decoded")
    reads = Renamed("needs.pages_read")
    carry = Renamed("token_state")
    fold = Renamed("merge")
    channels = Renamed("key_channels")
    replayed = Renamed("reconstructed")

    def __init_subclass__(cls, alias: str | None = None) -> None:
        """Record the alias, and keep ``dataclass`` from writing a ``repr`` of its own."""
        super().__init_subclass__()
        cls.alias = alias
        cls.__repr__ = BasePress.__repr__
        adopt_renamed(cls, BasePress)

    def __repr__(self) -> str:
        """Spell the press as ``cachepress.parse`` reads it, without keyword-only defaults."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)  # pyright: ignore[reportArgumentType]
            if not (field.kw_only and getattr(self, field.name) == field.default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def needs(self) -> Needs:
        """What must be observed for the scores, and how kept pairs are stored."""
        return Needs()

    @property
    def budget(self) -> Budget:
        """How many pairs are kept, and which of them compete."""
        raise NotImplementedError(f"{type(self).__name__} has no budget")

    @property
    def schedule(self) -> Schedule:
        """When a layer is compressed."""
        return AfterPrefill()

    @property
    def learned(self) -> Mapping[str, str]:
        """The kind of artefact that each option names a file of, for what is learned of a model."""
        return {}

    def score(self, view: LayerView) -> Tensor:
        """Score each pair, ``[B, H, T]``; those with the highest scores are kept.

        What is not ``view.valid`` is never kept, whatever its score.
        """
        raise NotImplementedError(f"{type(self).__name__} has no score")

    def reconstructed(self, view: ReconstructionView) -> Tensor:
        """Compute a number for each token of a chunk that the model repeated, ``[H, chunk]``.

        When the layer is scored, ``view.hidden_feature`` holds these numbers. Called only for
        presses whose needs declare a reconstruction.
        """
        raise NotImplementedError(f"{type(self).__name__} reconstructs no context")

    def token_state(self, view: LayerView) -> Tensor | None:
        """Compute a number to keep with each token until the next compression, ``[B, H, T]``.

        When the layer is scored again, ``view.token_state`` holds these numbers. For presses whose
        scores need what only earlier forwards showed; their needs declare ``token_state``. Others
        return None.
        """
        return None

    def merge(self, view: LayerView, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """Merge the pairs that are evicted into those that ``mask [B, H, T]`` keeps.

        Returns:
            Keys ``[B, H, T, D]`` and values ``[B, H, T, E]``, of which those in ``mask`` are
            stored; None to store the pairs unchanged.
        """
        return None

    def pair_bias(self, view: LayerView, mask: Tensor) -> Tensor | None:
        """Compute what is added to the logits of the pairs that ``mask [B, H, T]`` keeps.

        With the logarithm of a number a pair counts as that many equal ones: so it can stand for
        tokens that were merged into it. It is stored with the pair until the next compression, when
        ``view.pair_bias`` holds it, and what is returned then replaces it. For presses whose needs
        declare ``pair_bias``; others leave each pair the bias that it has.

        Returns:
            ``[B, H, T]``, of which the numbers in ``mask`` are stored, those below the lowest
            float32 as that one; None for no bias.
        """
        return view.pair_bias

    def key_channels(self, view: LayerView, mask: Tensor) -> Tensor | None:
        """Choose the channels in which the keys of ``mask [B, H, T]`` are stored.

        Returns:
            Bool ``[B, H, D]``, with as many channels in every head; None for all channels.
        """
        return None

    def with_ratio(self, ratio: float) -> Self:
        """Return the same press at another compression ratio."""
        raise CachepressError(f"{type(self).__name__} has no compression ratio to set")

    def acting(self, step: Step) -> "BasePress":
        """Return the press that acts in a forward: this one, unless it is made of several."""
        return self

    def check_layers(self, n_layers: int) -> None:
        """Raise CachepressError if a model has too many or too few compressed layers."""

    def files(self, model: str) -> Mapping[str, Sequence[Path]]:
        """Find the files of learned artefacts that the press reads for a model, by their kind.

        Raises:
            CachepressError: if one is missing.
        """
        if not self.learned:
            return {}
        from cachepress.artefacts.kept import (
            locate_artefact,  # It knows models, which a press does not.
        )

        return {
            kind: [Path(locate_artefact(kind, getattr(self, option), model))]
            for option, kind in self.learned.items()
        }

    def for_model(self, model: "PreTrainedModel") -> "BasePress":
        """Return the press with all that it needs of a model found and checked.

        Called whenever the press is put on a model, before any forward; a press should cache what
        is costly to find.

        Raises:
            CachepressError: if it does not fit the model, or what it needs cannot be found.
        """
        return self

    def __enter__(self) -> NoReturn:
        """Raise: a press acts on a model."""
        raise CachepressError(f"got {self!r} without a model: write `with press(model):`")

    def __exit__(self, *_: object) -> None:
        """Nothing: no block is entered without a model."""

    def __call__(
        self,
        model: "PreTrainedModel",
        *,
        turns: str = "all",
        storage: str | Codec = "full",
        question: int | Sequence[int] | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> AbstractContextManager[None]:
        """Compress the KV cache of all forwards of a model inside the ``with`` block.

        Args:
            model: a transformers decoder model.
            turns: "all" compresses after every forward of several tokens, "first" only after the
                first of a text, so that later prompts are kept whole.
            storage: how kept pairs are stored: "full" in the model's type, or as the press
                declares; "int8", "int4", "int2", or a ``Codec``. Keys are quantised by channel,
                values by token; the newest 64 tokens of a head stay in the model's type.
            question: number of tokens at the end of the prompt that are the question, one number
                or one for each sequence; for presses that need it.
            tokenizer: for presses that reconstruct the context; None to load the one that was saved
                with the model.

        Raises:
            UnsupportedError: if the model's cache cannot be compressed.
        """
        from cachepress.hf.session import PressSession  # It knows transformers, a press does not.

        return PressSession(self, model, turns, storage, question, tokenizer)


@dataclass(frozen=True, repr=False)
class ScorerPress(BasePress):
    """A press that scores pairs, with the same budget for every head: the base of most methods.

    Attributes:
        compression_ratio: fraction of pairs removed, 0 <= ratio < 1.
        n_kept: instead of a ratio, the pairs that each head keeps, on average where heads compete.
        max_bytes: instead of a ratio, the bytes that the compressed layers of the cache may
            allocate together, such as "1.5GiB".
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
        """How many pairs each head keeps: a ratio, a number or bytes."""
        if self.n_kept is not None:
            return Fixed(self.n_kept)
        if self.max_bytes is not None:
            return Bytes(parse_bytes(self.max_bytes))
        return Ratio(self.compression_ratio)

    @property
    def budget(self) -> TopK:
        """Keep the pairs with the highest scores in each head."""
        return TopK(self.amount)

    def with_ratio(self, ratio: float) -> Self:
        """Return the same press at another compression ratio."""
        return replace(self, compression_ratio=ratio, n_kept=None, max_bytes=None)


@dataclass(frozen=True, repr=False)
class WrapperPress(BasePress):
    """A press around another one: does as the inner press does, but for what subclasses override.

    Attributes:
        press: the inner press, or its spelling.
        usual: the class that errors name as what is wrapped.
    """

    usual: ClassVar[str] = "SnapKVPress"
    press: BasePress

    def __new__(cls, *given: object, **named: object) -> Self:
        """Say what to write where an inner press is needed and none is given."""
        if not given and "press" not in named:
            from cachepress.given import check_needs_none  # It knows wrappers.

            check_needs_none(cls)
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[BasePress]:
        """Give copies and unpickled wrappers their press."""
        return (self.press,)

    def __post_init__(self) -> None:
        check_values(self)
        object.__setattr__(self, "press", self._inner(self.press))

    @classmethod
    def _inner(cls, given: object) -> BasePress:
        from cachepress.given import inner_press  # It knows wrappers.

        return inner_press(cls, given)

    @property
    def needs(self) -> Needs:
        """What the inner press needs."""
        return self.press.needs

    @property
    def budget(self) -> Budget:
        """The inner press's budget."""
        return self.press.budget

    @property
    def schedule(self) -> Schedule:
        """The inner press's schedule."""
        return self.press.schedule

    @property
    def compression_ratio(self) -> float | None:
        """The inner press's compression ratio; None if it has none."""
        return getattr(self.press, "compression_ratio", None)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs as the inner press does, ``[B, H, T]``."""
        return self.press.score(view)

    def reconstructed(self, view: ReconstructionView) -> Tensor:
        """Compute what the inner press does of a chunk that the model repeated."""
        return self.press.reconstructed(view)

    def token_state(self, view: LayerView) -> Tensor | None:
        """Compute the number that the inner press keeps with each token."""
        return self.press.token_state(view)

    def merge(self, view: LayerView, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """Merge evicted pairs as the inner press does."""
        return self.press.merge(view, mask)

    def pair_bias(self, view: LayerView, mask: Tensor) -> Tensor | None:
        """Compute the bias that the inner press adds to the logits of kept pairs."""
        return self.press.pair_bias(view, mask)

    def key_channels(self, view: LayerView, mask: Tensor) -> Tensor | None:
        """Choose the key channels that the inner press chooses."""
        return self.press.key_channels(view, mask)

    def acting(self, step: Step) -> BasePress:
        """Return the same wrapper around the inner press that acts in a forward."""
        acting = self.press.acting(step)
        return self if acting is self.press else replace(self, press=acting)

    def check_layers(self, n_layers: int) -> None:
        """Raise if the inner press does not fit the model."""
        self.press.check_layers(n_layers)

    def for_model(self, model: "PreTrainedModel") -> BasePress:
        """Return the same wrapper around the inner press made ready for a model."""
        ready = self.press.for_model(model)
        return self if ready is self.press else replace(self, press=ready)

    def with_ratio(self, ratio: float) -> Self:
        """Return the same wrapper around the inner press at another compression ratio."""
        return replace(self, press=self.press.with_ratio(ratio))


def with_inner(press: BasePress) -> Iterator[BasePress]:
    """Iterate over a press and every press inside of it."""
    yield press
    for given in fields(press):  # type: ignore
        value = getattr(press, given.name)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, BasePress):
                yield from with_inner(item)


def with_real_paths(press: BasePress) -> BasePress:
    """Return the same press with every file that it names given by its real, absolute path."""
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
    """Iterate over every press class that is defined in this process."""
    for kind in base.__subclasses__():
        yield kind
        yield from all_presses(kind)
