"""An attention call: what one layer showed in one forward.

The attention function makes it and hands it to the hook that hangs on the cache layer; nothing of
it is kept anywhere else. Shape letters are explained in ``cachepress.view``.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from cachepress.cache.handle import RowsHandle
from cachepress.cache.masks import TextMask
from cachepress.cache.pairs import Pairs
from cachepress.ops import AttentionRule
from cachepress.view import Rotary


class Place(NamedTuple):
    """Where in a model, and where in the text, an attention call is.

    Attributes:
        layer: index of the layer in the model.
        depth: rank of the layer among those that are compressed.
        n_layers: number of layers that are compressed.
        rope: ``[B, n]`` positions that the forward's tokens are rotated to.
        n_question: ``[B]`` tokens at the end of the text that are the question; None for none.
    """

    layer: int
    depth: int
    n_layers: int
    rope: Tensor
    n_question: Tensor | None = None


class Features(Protocol):
    """What can be found about an attention call besides what attention itself was given."""

    def rotary(self, call: "AttentionCall") -> Rotary:
        """The layer's position embedding, proven on the keys of the call."""
        ...

    def projection(self, call: "AttentionCall") -> Tensor:
        """The layer's output projection, ``[H, G, E, M]``."""
        ...

    def hidden(self, call: "AttentionCall") -> Tensor | None:
        """Hidden states that attention read, ``[B, n, M]``; None where no press asked for them."""
        ...


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of one layer, when attention is done.

    Attributes:
        module: the attention module.
        key: the handle of the layer's pairs; None when the forward is over.
        query: ``[B, H * G, n, D]`` as attention used it.
        output: ``[B, n, H * G, E]`` what attention gave.
        mask: the mask over the text.
        rule: how the layer turns products into weights.
        place: where the call is.
        features: what else can be found about it.
        read: the pairs as attention read them; None where the cache layer attended itself.
    """

    module: nn.Module
    key: RowsHandle | None
    query: Tensor
    output: Tensor
    mask: TextMask
    rule: AttentionRule
    place: Place
    features: Features
    read: Pairs | None = None

    @cached_property
    def pairs(self) -> Pairs:
        """All pairs of the layer, those of this forward last."""
        if self.read is not None:
            return self.read
        assert self.key is not None
        return self.key.snapshot.rows()

    @property
    def text_valid(self) -> Tensor | None:
        """Which text columns are tokens, ``[B, S]``; None when all are."""
        return self.mask.valid

    def rotary(self) -> Rotary:
        """The layer's position embedding, proven on the keys of this call."""
        return self.features.rotary(self)

    def projection(self) -> Tensor:
        """The layer's output projection, ``[H, G, E, M]``."""
        return self.features.projection(self)

    @cached_property
    def hidden(self) -> Tensor | None:
        """Hidden states that attention read, ``[B, n, M]``; None where no press asked for them."""
        return self.features.hidden(self)

    def when_over(self, rotates: bool, projects: bool) -> "AttentionCall":
        """The call as it can be used when the forward is over, without what is large.

        Args:
            rotates: whether the position embedding will be asked for.
            projects: whether the output projection will be.
        """
        found = _Found(self.rotary() if rotates else None, self.projection() if projects else None)
        pairs, valid = self.pairs, self.text_valid
        return replace(
            self,
            key=None,
            query=self.query[:, :, :0].clone(),
            output=self.output[:, :0].clone(),
            mask=TextMask(None if valid is None else valid.long(), self.query.shape[2]),
            features=found,
            read=Pairs(pairs.keys[:, :, :0].clone(), pairs.values[:, :, :0].clone()),
        )


class _Found(NamedTuple):
    """What was found of a forward that is over."""

    found_rotary: Rotary | None
    found_projection: Tensor | None

    def rotary(self, call: AttentionCall) -> Rotary:
        """The position embedding."""
        assert self.found_rotary is not None, "a press reads what it did not declare"
        return self.found_rotary

    def projection(self, call: AttentionCall) -> Tensor:
        """The output projection."""
        assert self.found_projection is not None, "a press reads what it did not declare"
        return self.found_projection

    def hidden(self, call: AttentionCall) -> None:
        """None: hidden states are gone."""


class Hook(Protocol):
    """Observes the next attention call of a layer."""

    @property
    def place(self) -> Place:
        """Where the call is."""
        ...

    @property
    def features(self) -> Features:
        """What finds more about the call."""
        ...

    @property
    def differentiates(self) -> bool:
        """Whether gradients must flow through the pairs of the forward."""
        ...

    def observe(self, call: AttentionCall) -> None:
        """Look at the call; attention is done, and its result does not change."""
        ...
