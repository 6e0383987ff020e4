"""The compressed layer: a transformers cache layer whose heads keep different tokens.

It holds what it is told to keep; what that is, presses and budgets decide.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from cachepress.cache.bytes import allocated_bytes, bytes_of_pairs
from cachepress.cache.codec import Codec
from cachepress.cache.handle import RowsHandle
from cachepress.cache.kernel import Plans
from cachepress.cache.masks import MaskReader
from cachepress.cache.pairs import PairBytes, Pairs
from cachepress.cache.segment import Segment, segments_of
from cachepress.cache.snapshot import Snapshot
from cachepress.cache.tail import SLACK, Tail, slack_after
from cachepress.cache.traced import TracedLayer
from cachepress.compiling import untraced
from cachepress.errors import CachepressError, UnsupportedError
from cachepress.ops import backward_task, following, storing

if TYPE_CHECKING:
    from cachepress.call import Hook, Rotated
    from cachepress.query_stats import QueryStats


class CompressedLayer(TracedLayer):
    """Cache layer of transformers from which key-value pairs can be evicted, head by head.

    ``get_seq_length()`` is what was *seen*, so positions and masks of the next forward come out
    right; ``lengths`` is what is *held*. What was compressed is in segments that never change, with
    each head's own number of pairs, and may be shared with other caches; what came since is in a
    tail of this layer's own.

    Attributes:
        text_valid: ``[B, S]`` which of the compressed text columns are tokens; None if all.
        codec: how kept pairs are stored; None for as they are.
        page_budget: pages of segments that a decoded token reads in each head; None for all.
        scored_at: text columns seen at the last compression, and of prompts not compressed since.
        query_stats: what was observed of queries since.
        rotated: what is proven of how its keys were rotated; None for nothing.
        hook: observes the next attention call of the layer; None for nobody.
        reads_whole: whether forwards of one token read every page, being parts of a text.
        masks: reads the mask of a forward, once for all layers of the cache.
        selection: keeps the attention function that reads the layer selected on the model.
        text_ids: ``[1, n]`` token ids that texts begin with, on the host; None if not known.
    """

    def __init__(self) -> None:
        self._segments: tuple[Segment, ...] = ()
        self._tail: Tail | None = None
        self._batch, self._seen, self._compressed_at, self.scored_at = -1, 0, 0, 0
        self.query_stats: QueryStats | None = None
        self.rotated: Rotated | None = None
        self.codec: Codec | None = None
        self.page_budget: int | None = None
        self.hook: Hook | None = None
        self.reads_whole = self._encoded = False
        self.masks, self._plans = MaskReader(), Plans()
        self.selection: object = None
        self._task: int | None = None
        self.text_valid: Tensor | None = None
        self.text_ids: np.ndarray | None = None
        self.be_numbered()

    @classmethod
    def adopt(cls, keys: Tensor | None, values: Tensor | None) -> "CompressedLayer":
        """Make a compressed layer of an ordinary layer's keys and values, ``[B, H, T, D]`` each."""
        layer = cls()
        if keys is not None and values is not None and keys.numel():
            layer._append(keys, values)
            layer.scored_at = layer._seen
        return layer

    @property
    def is_initialized(self) -> bool:
        """Whether anything was written."""
        return self._batch > 0

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 before the first forward."""
        return self._batch

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Held keys ``[B, H, N, D]``; None before the first forward."""
        return self.snapshot.rows().keys if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Held values ``[B, H, N, E]``; None before the first forward."""
        return self.snapshot.rows().values if self.is_initialized else None

    @property
    def positions(self) -> Tensor:
        """Text column of each held pair, ``[B, H, N]``; -1 in an empty slot."""
        return self.snapshot.rows().text_positions()

    @property
    def lengths(self) -> Tensor:
        """Pairs held by each head, ``[B, H]``; pairs that sequences share count for each."""
        return self.snapshot.lengths()

    @property
    def snapshot(self) -> Snapshot:
        """Snapshot of what the layer holds now, which attention reads."""
        if not self.is_initialized:
            raise CachepressError("the cache is empty: run a forward with it first")
        tail = None if self._tail is None else self._tail.read()
        shape = (self._seen, self._batch)
        return Snapshot(
            self._segments, tail, *shape, self.text_valid, self.page_budget, self._plans
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated, free slots and bookkeeping included."""
        return allocated_bytes(self.tensors())

    @property
    def whole_nbytes(self) -> int:
        """Bytes of an uncompressed layer that saw the same text, padding included."""
        if not self.is_initialized:
            return 0
        if self._tail is not None:
            row = sum(x.shape[-1] * x.element_size() for x in self._tail.tensors())
        else:
            row = self._segments[0].whole_row
        return self._seen * self._batch * self.snapshot.heads * row

    def tensors(self) -> list[Tensor]:
        """List all tensors that are allocated; layers of one cache can share the padding mask."""
        found = [x for segment in self._segments for x in segment.tensors()]
        found += [] if self._tail is None else self._tail.tensors()
        found += self._plans.tensors()
        return found if self.text_valid is None else [*found, self.text_valid]

    @untraced
    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        self._append(key_states, value_states)
        keys = RowsHandle.of(self, self.snapshot, new, key_states)
        if key_states.shape == value_states.shape:
            return keys, keys
        return keys, RowsHandle.of(self, keys.snapshot, new, value_states)

    @storing
    def keep(
        self,
        pairs: Pairs,
        mask: Tensor,
        text_valid: Tensor | None = None,
        key_channels: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> None:
        """Evict all pairs but those of ``mask [B, H, T]``, and copy these to new storage in order.

        Args:
            pairs: everything that is held.
            mask: what stays of it.
            text_valid: ``[B, S]`` which text columns are tokens; None where all are.
            key_channels: ``[B, H, D]`` which channels of the keys are stored, as many in every
                head; None for all.
            lengths: how many pairs each of the ``B * H`` heads keeps; None if that is not known.
        """
        stored = (self.codec, key_channels, self._bounded)
        self._segments = segments_of(pairs, mask, *stored, lengths)
        self._tail, self._encoded = None, False
        self._compressed_at, self.text_valid = self._seen, text_valid

    @property
    def recodes(self) -> bool:
        """Whether kept pairs are stored in another form: quantized, or in pages with bounds."""
        return self.codec is not None or self.page_budget is not None

    def pair_bytes(
        self, pairs: Pairs, compacts: bool, has_state: bool = False, has_bias: bool = False
    ) -> PairBytes:
        """Compute the bytes that kept pairs of a head need, with all that is kept with them."""
        return bytes_of_pairs(pairs, self.codec, self._bounded, compacts, has_state, has_bias)

    @storing
    def restore(self) -> None:
        """Store pairs as the model computed them, without a free slot, if none was ever evicted.

        What forks share is in pages, which have positions and end with free slots.
        """
        shared = any(segment.shape[0] != self._batch for segment in self._segments)
        if self._compressed_at or not self.is_initialized or shared:
            return
        if self._segments:
            rows = self.snapshot.rows()
            self._segments, self._encoded = (), False
            self._tail = Tail.of(rows.keys, rows.values, room=0)
        elif self._tail is not None:
            self._tail = self._tail.exact()

    def mark_scored(self) -> None:
        """Record that the layer was compressed now, whether or not a pair was evicted."""
        self.scored_at, self.query_stats = self._seen, None

    @storing
    def mark_skipped(self, n: int, bounded: bool = False) -> None:
        """Record that the last ``n`` tokens of a prompt were not compressed.

        Where the bytes are ``bounded`` they count as if they had been decoded, and are put into
        pages at once, as decoded ones are.
        """
        if not bounded:
            self.scored_at += n
        elif n and self._pages_tail:
            self._page_tail()

    @storing
    def fork(self) -> "CompressedLayer":
        """Fork the layer: the fork shares its pairs, and appends its own."""
        if self._tail is not None and self._tail.n > SLACK:
            self._freeze()
        forked = copy.copy(self)
        forked._tail = None if self._tail is None else self._tail.copy()
        forked.hook, forked.reads_whole = None, False
        forked.masks, forked._plans = MaskReader(), self._plans.anew()
        forked._task = backward_task()
        if self.query_stats is not None:
            forked.query_stats = self.query_stats.select(torch.arange(self._batch))
        return forked

    @storing
    def form(self) -> tuple[object, ...]:
        """Return what must be equal for layers to be stacked, after the tail became a segment."""
        if self._tail is not None:
            self._freeze()
        return (self._seen, self.codec, self.page_budget, *(x.form for x in self._segments))

    @classmethod
    @storing
    def stack(cls, layers: Sequence["CompressedLayer"], n: int) -> "CompressedLayer":
        """Stack layers of the same ``form`` into one of all their sequences, ``n`` times each.

        Pairs are copied once; the repeats share them.
        """
        stacked = copy.copy(layers[0])
        parts = zip(*(layer._segments for layer in layers), strict=True)
        with following(*(x for layer in layers for x in layer.tensors())):
            stacked._segments = tuple(Segment.stack(segments) for segments in parts)
        stacked._batch, stacked.text_ids = len(layers) * n, None
        stacked.query_stats, stacked.rotated = None, None
        stacked._plans = layers[0]._plans.anew()
        stacked._compressed_at = max(layer._compressed_at for layer in layers)
        return stacked

    @storing
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` text columns, or all after a positive length.

        Raises:
            CachepressError: if pairs would be needed that were evicted.
        """
        target = tokens_to_remove if tokens_to_remove > 0 else self._seen + tokens_to_remove
        if target >= self._seen or not self.is_initialized:
            return
        if target < self._compressed_at or target < 0:
            raise CachepressError(
                f"cannot crop a compressed cache to {target} tokens: pairs before "
                f"{self._compressed_at} were evicted when the prompt was compressed; crop to "
                f"{self._compressed_at} or more, and do assisted decoding after `with press(model)`"
                ", on a cache that cachepress.prefill compressed"
            )
        surplus, own = self._seen - target, 0 if self._tail is None else self._tail.n
        if self._tail is not None and surplus <= own:
            self._tail.crop(surplus)
        else:
            rows = self.snapshot.rows()
            positions = rows.text_positions()
            left = (positions >= 0) & (positions < target)
            self._segments = segments_of(rows, left, self.codec, bounded=self._bounded)
            self._tail, self._encoded = None, False
        self._seen = target
        self.text_ids = None if self.text_ids is None else self.text_ids[:, :target]
        self.scored_at, self.query_stats, self.rotated = min(self.scored_at, target), None, None

    def reset(self) -> None:
        """Remove all pairs; codec and page budget stay."""
        kept = self.codec, self.page_budget, self.selection
        self.__init__()
        self.codec, self.page_budget, self.selection = kept

    @storing
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the sequences by those of ``beam_idx [B']``, which may repeat.

        Pairs that all sequences share are not copied.
        """
        if not self.is_initialized:
            return
        index = beam_idx.to(self.snapshot.device)
        with following(*self.tensors()):
            self._segments = tuple(
                segment if segment.shape[0] == 1 else segment.select(index % segment.shape[0])
                for segment in self._segments
            )
        if self._tail is not None:
            self._tail = self._tail.select(index)
        if self.text_valid is not None:
            self.text_valid = self.text_valid[index.to(self.text_valid.device)]
        if self.query_stats is not None:
            self.query_stats = self.query_stats.select(index)
        self._batch = len(index)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Fork the layer: segments never change, so they need no copy."""
        forked = self.fork()
        forked.masks = copy.deepcopy(self.masks, memo)  # One for all layers of the copy.
        return forked  # pyright: ignore[reportReturnType]

    @storing
    def _append(self, keys: Tensor, values: Tensor) -> None:
        self._check_repeat()
        batch = keys.shape[0]
        if not self.is_initialized:
            self._batch = batch
        if batch != self._batch:
            if self._batch != 1:
                raise CachepressError(
                    f"the cache holds {self._batch} sequences and the forward has {batch}: wanted "
                    "the same number, or a cache of one sequence, which is shared by all"
                )
            self.reorder_cache(torch.zeros(batch, dtype=torch.long))
        if not torch.is_grad_enabled():
            # As in transformers' own caches, what was held is no part of a graph any more.
            self._segments = tuple(segment.detach() for segment in self._segments)
        if self._pages_tail:
            self._page_tail()
        if self._tail is None:
            self._tail = Tail.of(keys, values, slack_after(keys))
        else:
            self._tail.append(keys, values)
        self._count(keys.shape[2])

    def _count(self, n: int) -> None:
        super()._count(n)
        # What a prompt appends is mostly compressed before anything of it would be paged.
        if n < SLACK and self._tail and self.codec and self._pages_tail:
            self._tail.ask(self.codec.residual)

    def _check_repeat(self) -> None:
        """Raise UnsupportedError if a forward that was appended is run once more in a backward."""
        task = backward_task()
        if task is not None and self.is_initialized and self._task != task:
            raise UnsupportedError(
                "a forward is repeated in backward (gradient checkpointing), and would append its "
                "tokens to the cache again: in the function that is checkpointed, continue "
                "cachepress.fork(cache) in place of the cache"
            )
        self._task = task

    def _freeze(self) -> None:
        """Turn the tail into a segment, which forks can share."""
        assert self._tail is not None
        rows = self._tail.read().rows(self._seen)
        mask = torch.ones(rows.keys.shape[:3], dtype=torch.bool, device=rows.keys.device)
        self._segments = (*self._segments, Segment.of(rows, mask, bounded=self._bounded))
        self._tail, self._encoded = None, False

    @property
    def _bounded(self) -> bool:
        """Whether pages record the range of each key channel, for a page budget."""
        return self.page_budget is not None

    @property
    def _pages_tail(self) -> bool:
        """Whether the oldest pairs of a long tail are moved into pages."""
        return self.recodes and bool(self._compressed_at)

    def _page_tail(self) -> None:
        """Move the oldest pairs of a tail that is longer than the residual into full pages."""
        residual, tail = SLACK if self.codec is None else self.codec.residual, self._tail
        n = 0 if tail is None else tail.paged(residual)
        if not n or tail is None:
            return
        rows = tail.read().rows(self._seen)
        some = torch.ones(rows.keys.shape[:3], dtype=torch.bool, device=rows.keys.device)
        some[:, :, n:] = False
        known = {"lengths": (n,) * some[..., 0].numel(), "peaks": tail.peaks(n)}
        segment = Segment.of(rows, some, self.codec, bounded=self._bounded, **known)
        if self._encoded and self._segments[-1].form == segment.form:
            with following(*self.tensors()):
                segment, self._segments = self._segments[-1].join(segment), self._segments[:-1]
        self._segments, self._encoded = (*self._segments, segment), True
        with following(rows.keys, rows.values):
            self._tail = Tail.of(rows.keys[:, :, n:], rows.values[:, :, n:])
