"""Whether the parts of a cache fit together: counts, positions, shapes and layers."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cachepress.ops.ragged_attention import PAGE, Layout
from cachepress.stores import Codec, Store
from cachepress.stores.block import Block
from cachepress.stores.codec import Quantized
from cachepress.stores.tail import Tail


def check_cache(cache: Cache) -> None:
    """Raise ValueError unless all layers hold what layers can hold, of one text."""
    known = [layer for layer in cache.layers if isinstance(layer, Store)]
    for layer in known:
        _check_store(layer)
    if len({(layer.batch_size, layer.get_seq_length()) for layer in known}) > 1:
        raise ValueError("its layers are of texts of several lengths")
    for layer in cache.layers:
        keys = getattr(layer, "keys", None) if not isinstance(layer, Store) else None
        values = getattr(layer, "values", None) if keys is not None else None
        if keys is not None:
            _need(isinstance(keys, Tensor) and isinstance(values, Tensor), "keys and values")
            _need(keys.ndim == 4 and keys.shape[:3] == values.shape[:3], "keys like values")
            _need(not known or len(keys) == known[0].batch_size, "as many sequences in all layers")
        seen = getattr(layer, "cumulative_length", None)
        if isinstance(seen, int) and known:
            _need(seen == known[0].get_seq_length(), "the same text in all layers")
    _need(cache.get_seq_length() > 0, "tokens")


def check_text(ids: Tensor, cache: Cache) -> None:
    """Raise ValueError unless token ids are those of what a cache saw, or of its beginning."""
    _need(ids.dtype == torch.int64 and ids.ndim == 2 and len(ids) == 1, "token ids")
    _need(0 < ids.shape[1] <= cache.get_seq_length() and int(ids.min()) >= 0, "ids of its text")


def check_pages(parts: Mapping[str, object]) -> None:
    """Raise ValueError unless a block of these parts has the pages that its layout says."""
    shape, layout, positions = parts["shape"], parts["layout"], parts["positions"]
    _need(_counts(shape) and len(shape) == 2, "a shape")  # type: ignore
    _need(isinstance(layout, Layout) and _counts(layout.lengths, least=0), "lengths")  # type: ignore
    _need(len(layout.lengths) == shape[0] * shape[1], "a length for each head")  # type: ignore
    _need(isinstance(positions, Tensor), "positions")
    pages = (layout.n_pages, PAGE)  # type: ignore
    _need(positions.dtype == torch.int32 and positions.shape == pages, "positions in pages")  # type: ignore


def _check_store(store: Store) -> None:
    state = vars(store)
    counts = [state[name] for name in ("_batch", "_seen", "_settled_at", "looked_at")]
    _need(_counts(counts, least=0), "counts")
    batch, seen, settled, looked = counts
    _need(batch > 0 and seen > 0 and max(settled, looked) <= seen, "counts that fit")
    _need(state["_groups"] == () and state["trace"] is None, "one group of sequences")
    _need(isinstance(state["_encoded"], bool), "flags")
    _need(store.codec is None or isinstance(store.codec, Codec), "a codec")
    _need(store.reads is None or _counts([store.reads]), "pages to read")
    blocks, tail = state["_blocks"], state["_tail"]
    _need(isinstance(blocks, tuple) and all(isinstance(x, Block) for x in blocks), "blocks")
    _need(tail is None or isinstance(tail, Tail), "a tail")
    _need(bool(blocks) or tail is not None, "rows")
    _check_known(store.known, batch, seen)
    heads = {block.shape[1] for block in blocks} | ({tail.keys.shape[1]} if tail else set())
    _need(len(heads) == 1, "as many heads everywhere")
    last: Tensor | None = None
    for block in blocks:
        _need(batch % block.shape[0] == 0, "sequences that share rows")
        first, end = _check_block(block, seen)
        if last is not None and last.shape == first.shape:
            _need(bool((first > last).all()), "positions that rise from block to block")
        last = end if last is None or last.shape != end.shape else torch.maximum(last, end)
    if tail is not None:
        _check_tail(tail, batch, seen, last)
    _need(int(store.lengths.max()) <= seen, "no more rows than tokens")


def _check_known(known: Tensor | None, batch: int, seen: int) -> None:
    if known is None:
        return
    _need(isinstance(known, Tensor) and known.dtype == torch.bool and known.ndim == 2, "a mask")
    _need(known.shape[0] == batch and known.shape[1] <= seen, "a mask of the text")


def _check_tail(tail: Tail, batch: int, seen: int, last: Tensor | None) -> None:
    keys, values = tail.read().keys, tail.read().values
    _need(keys.ndim == values.ndim == 4 and keys.shape[:3] == values.shape[:3], "a tail")
    _need(keys.shape[0] == batch and 0 < tail.n <= seen, "a tail of the text")
    _need(keys.dtype == values.dtype and keys.is_floating_point(), "numbers in the tail")
    _need(last is None or int(last.max()) < seen - tail.n, "a tail that is newer than the blocks")


def _check_block(block: Block, seen: int) -> tuple[Tensor, Tensor]:
    """The first and the last position of each head, ``[F, H]``; those of empty heads exclude."""
    layout, pages = block.layout, block.layout.n_pages
    table, real = layout.padded()
    positions = torch.where(real, block.positions.flatten()[table], -1)
    used = int((block.positions >= 0).sum())
    _need(used == sum(layout.lengths) == int((positions >= 0).sum()), "positions in used slots")
    _need(not used or int(positions.max()) < seen, "positions in the text")
    _need(bool(((positions[:, 1:] > positions[:, :-1]) | ~real[:, 1:]).all()), "rising positions")
    width, stored = block.width, block.width
    _need(_counts([width]), "channels")
    if block.channels is not None:
        stored = block.channels.shape[-1]
        _need(block.channels.shape == (len(layout.lengths), stored), "channels of each head")
        rising = block.channels.diff(dim=-1) > 0
        _need(bool(rising.all()) and int(block.channels.min()) >= 0, "rising channels")
        _need(int(block.channels.max()) < width, "channels of keys")
    _check_numbers(block.keys, (pages, PAGE, stored))
    size = _width(block.values)
    _check_numbers(block.values, (pages, PAGE, size))
    for x in (block.rope, block.carried):
        _need(x is None or x.shape == (pages, PAGE), "a number for each slot")
    bounds = block.bounds
    _need(bounds is None or bounds.shape == (pages, 2, stored), "bounds of each page")
    shape = block.shape
    if not positions.shape[1]:
        nothing = torch.full(shape, seen, device=positions.device)
        return nothing, torch.full_like(nothing, -1)
    first = positions[:, 0].masked_fill(~real[:, 0], seen)
    return first.view(shape), positions.amax(-1).view(shape)


def _width(x: Tensor | Quantized) -> int:
    """Numbers of a row."""
    return x.codes.shape[-1] * 8 // x.bits if isinstance(x, Quantized) else x.shape[-1]


def _check_numbers(x: Tensor | Quantized, shape: tuple[int, int, int]) -> None:
    if isinstance(x, Tensor):
        _need(x.shape == shape and x.is_floating_point(), "numbers in pages")
        return
    _need(isinstance(x, Quantized) and x.bits in (2, 4, 8), "bits")
    _need(x.codes.dtype == torch.uint8 and x.codes.shape[:2] == shape[:2], "codes in pages")
    _need(_width(x) == shape[2] and isinstance(x.dtype, torch.dtype), "codes of each number")
    _need(x.scale.shape == x.zero.shape and x.scale.is_floating_point(), "scales")
    each = x.scale.shape
    if x.group is None:
        _need(each in ((shape[0], 1, shape[2]), (*shape[:2], 1)), "scales of channels or rows")
    else:
        _need(_counts([x.group]) and each == (*shape[:2], -(-shape[2] // x.group)), "scales")


def _counts(values: object, least: int = 1) -> bool:
    """Whether values are whole numbers of at least so much."""
    return isinstance(values, list | tuple) and all(
        isinstance(x, int) and not isinstance(x, bool) and x >= least for x in values
    )


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"it does not have {what}")
