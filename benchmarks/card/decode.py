"""Decoded steps of the whole model, by ``decode`` and by ``generate``, against their limit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers.cache_utils import Cache

import cachepress as cp
from benchmarks.card.lab import (
    ADA_75,
    ADA_90,
    COMPILED,
    DYNAMIC,
    EAGER,
    INT4,
    KVZIP,
    QUEST,
    RECORDED,
    SNAP_75,
    WHOLE,
    Cells,
    Kind,
    Lab,
    replays,
    stepping,
)
from benchmarks.card.plan import Sizes
from benchmarks.card.records import Values
from benchmarks.card.timing import generate_seconds, loop_seconds
from cachepress.measure import bytes_of_step

MIB = 2**20
LOOP, GENERATE = "loop", "generate()"
PLAIN = "transformers"


@dataclass(frozen=True)
class Step:
    """One way to take steps after one kind of cache.

    Attributes:
        batch: sequences.
        length: tokens of each context.
        kind: how the cache was filled.
        mode: how steps are taken: "recorded", "eager" or "compiled"; "transformers" for its own.
        way: our own loop, ``cachepress.decode``, or ``generate()``.
    """

    batch: int
    length: int
    kind: Kind
    mode: str = RECORDED
    way: str = LOOP

    @property
    def name(self) -> str:
        """The name of its cell."""
        return f"{self.batch} x {self.length}, {self.kind.name}, {self.mode}, {self.way}"


def decode_steps(sizes: Sizes) -> list[Step]:
    """List what is measured, the most important first; caches are made as rarely as can be."""
    one, some, _ = sizes.batches
    long, short = sizes.long, sizes.short
    return [
        Step(one, long, ADA_90),
        Step(one, long, ADA_90, RECORDED, GENERATE),
        Step(one, long, DYNAMIC, PLAIN, GENERATE),
        Step(one, long, DYNAMIC, PLAIN),
        Step(one, long, WHOLE),
        Step(one, long, ADA_90, EAGER),
        Step(some, long, ADA_75),
        Step(some, long, WHOLE),
        Step(some, long, ADA_75, RECORDED, GENERATE),
        Step(some, long, DYNAMIC, PLAIN),
        Step(one, short, ADA_90),
        Step(one, short, WHOLE),
        Step(one, short, ADA_90, RECORDED, GENERATE),
        Step(one, short, DYNAMIC, PLAIN, GENERATE),
        Step(one, long, ADA_90, COMPILED),
        Step(one, long, WHOLE, COMPILED),
        Step(one, long, SNAP_75),
        Step(one, long, INT4),
        Step(one, long, QUEST),
        Step(some, long, SNAP_75),
        Step(some, long, INT4),
        Step(some, long, QUEST),
        Step(one, long, KVZIP),
    ]


def room_steps(sizes: Sizes) -> list[Step]:
    """List what is measured as far as the card holds it."""
    one, some, many = sizes.batches
    longest, long, short = sizes.longest, sizes.long, sizes.short
    return [
        Step(one, longest, ADA_90),
        Step(one, longest, WHOLE),
        Step(some, longest, ADA_90),
        Step(some, longest, WHOLE),
        Step(many, longest, ADA_90),
        Step(many, longest, WHOLE),
        Step(one, longest, DYNAMIC, PLAIN),
        Step(many, long, ADA_90),
        Step(many, long, ADA_75),
        Step(many, long, WHOLE),
        Step(some, short, ADA_75),
        Step(some, short, WHOLE),
        Step(many, short, ADA_75),
        Step(many, short, WHOLE),
        Step(many, short, INT4),
        Step(many, short, QUEST),
        Step(many, short, DYNAMIC, PLAIN),
    ]


def decode(lab: Lab) -> Cells:
    """Give the cells of decoded steps, after that of the copy that they are compared with."""
    yield "copy", partial(copy_of, lab)
    yield from cells(lab, decode_steps(lab.sizes))


def room(lab: Lab) -> Cells:
    """Give the cells of long contexts and large batches."""
    yield from cells(lab, room_steps(lab.sizes))


def cells(lab: Lab, steps: Sequence[Step]) -> Cells:
    """Give a cell for each step."""
    for step in steps:
        yield step.name, partial(measured, lab, step)


def copy_of(lab: Lab) -> Values:
    """Measure the bandwidth that others are shares of."""
    return {"gb_s": lab.copy / 1e9}


def measured(lab: Lab, step: Step) -> Values:
    """Measure steps: milliseconds of one, and the limit of its bytes."""
    model, cache = lab.model(), lab.cache(step.kind, step.length, step.batch)
    size = cp.size_of(cache)
    limit = bytes_of_step(model, cache) / lab.copy
    again, before, ids = _again(cache, step), replays(), lab.ids(step.length)
    with stepping(step.mode):
        if step.way == LOOP:
            token = ids[:, :1].expand(step.batch, 1)
            seconds = loop_seconds(model, again(), token, lab.sizes.steps)
        else:
            ids = torch.cat([ids, ids[:, :1]], dim=1).expand(step.batch, -1)
            seconds = generate_seconds(model, ids, again, lab.sizes.steps)
    again()
    return {
        "batch": step.batch,
        "length": step.length,
        "cache": step.kind.name,
        "mode": step.mode,
        "way": step.way,
        "ms": 1e3 * seconds,
        "limit_ms": 1e3 * limit,
        "of_limit": seconds / limit,
        "tokens_s": step.batch / seconds,
        "held_mib": size.bytes_after / MIB,
        "pairs_share": size.pairs_held / size.pairs_seen,
        "replayed": replays() - before,
    }


def _again(cache: Cache, step: Step) -> Callable[[], Cache]:
    """Return what gives the cache anew as it was after the context, at the cost of what it adds."""

    def again() -> Cache:
        if step.kind != DYNAMIC:
            return cp.fork(cache)
        if surplus := cache.get_seq_length() - step.length:
            cache.crop(-surplus)
        return cache

    return again
