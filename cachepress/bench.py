"""Benchmarks presses on one machine: seconds, bytes and bandwidth (``cachepress bench``).

Runs are interleaved and repeated, and medians are compared: a shared machine is never quiet.
"""

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data import topics

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from cachepress.cache.batch import fork, size_of
from cachepress.errors import CachepressError
from cachepress.generation.prefill import check_prefill, prefill
from cachepress.given import spellings_of
from cachepress.hf import cache_argument, trained_length
from cachepress.hf.types import Cache, PreTrainedModel
from cachepress.limits import check_whole, shown
from cachepress.measure import (
    Stopwatch,
    bytes_of_step,
    copy_bandwidth,
    machine_of,
    peak_memory,
)
from cachepress.models.loading import load
from cachepress.models.shapes import random_model
from cachepress.options import BenchFields
from cachepress.presses import BasePress
from cachepress.spec import NO_PRESS, parse

MIB = 2**20
HEADERS = (
    *("press", "tokens", "batch", "forks", "prefill s", "press %", "ms a step", "middle half"),
    *("ratio", "held MiB", "peak MiB", "% of copy"),
)
_QUESTION = 32
"""Tokens at the end of a context that stand for a question, for presses that look at one."""


@dataclass(frozen=True)
class BenchOptions(BenchFields):
    """Checked options of a benchmark: the fields of ``cachepress.options.BenchFields``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "presses", spellings_of(self.presses))
        if not isinstance(self.presses, list | tuple):
            raise CachepressError(f"presses: got {shown(self.presses)}, wanted a list")
        for name in ("lengths", "batch_sizes", "forks"):
            for n in getattr(self, name):
                check_whole(name, n)
        for name in ("steps", "repeats", "layers"):
            if (n := getattr(self, name)) is not None or name != "layers":
                check_whole(name, n)
        if any(b > 1 and f > 1 for b in self.batch_sizes for f in self.forks):
            raise CachepressError("forks are continuations of one context: give batch size 1")
        for press in self.made():
            check_prefill(press, self.prefill_chunk_size, self.prefill_mode, self.storage)

    def made(self) -> list[BasePress]:
        """Make the presses, each at every ratio."""
        parsed = [press for text in self.presses if (press := parse(text)) is not None]
        if not self.ratios:
            return parsed
        return [press.with_ratio(ratio) for press in parsed for ratio in self.ratios]


@dataclass
class Timing:
    """Seconds and bytes of one press, for contexts of one length and batch size.

    Attributes:
        press: its spelling.
        length: tokens of context.
        batch_size: contexts read at once.
        forks: continuations of each.
        prefill: seconds of each prefill, compression included.
        scoring: seconds of it that went into scoring and evicting.
        decode: seconds of each decoded step.
        held: bytes of the cache after prefill.
        peak: most bytes that a prefill needed above what was there before.
        read: bytes that a step has to read: the weights, and the pairs held.
    """

    press: str
    length: int
    batch_size: int
    forks: int
    prefill: list[float] = field(default_factory=list)
    scoring: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    held: int = 0
    peak: int = 0
    read: int = 0

    @property
    def share(self) -> float:
        """Median share of scoring and evicting in a prefill, relative to the rest of it."""
        pairs = zip(self.prefill, self.scoring, strict=True)
        return statistics.median(scoring / (whole - scoring) for whole, scoring in pairs)

    @property
    def step(self) -> float:
        """Median seconds of a decoded step."""
        return statistics.median(self.decode)

    @property
    def bandwidth(self) -> float:
        """Bytes that a decoded step has to read, a second of its median."""
        return self.read / self.step


@dataclass(frozen=True)
class BenchResult:
    """The result of a benchmark, as its JSON holds it.

    Attributes:
        machine: the model, and what it ran on.
        options: what was asked for.
        cells: a timing for each press and kind of context.
        copy: bytes a second that a copy on the device reads and writes; 0 in an old file.
    """

    machine: str
    options: Mapping[str, object]
    cells: list[Timing]
    copy: float = field(default=0.0, kw_only=True)


def run_bench(options: BenchOptions, quiet: bool = False) -> BenchResult:
    """Time every press at every length and batch size.

    Raises:
        CachepressError: if an option is wrong, or a length is more than the model has room for.
    """
    presses: list[BasePress | None] = [*([None] if options.baseline else []), *options.made()]
    model, ids = _model_and_text(options)
    _check_lengths(model, options)
    found, copy = [], copy_bandwidth(model.device)
    kinds = list(itertools.product(options.lengths, options.batch_sizes, options.forks))
    total = len(kinds) * options.repeats * len(presses)
    with tqdm(total=total, unit="run", disable=quiet) as bar:
        for length, batch, forks in kinds:
            group = [Timing(repr(p) if p else NO_PRESS, length, batch, forks) for p in presses]
            for _ in range(options.repeats):
                _repeat(model, ids, presses, group, options, bar)
            found += group
    return BenchResult(machine_of(model), asdict(options), found, copy=copy)


def bench_table(result: BenchResult) -> str:
    """Format a result as a table, each press compared with the cache without one.

    The last column is the bandwidth of a step as a share of that of a copy.
    """
    lines, base = [], None
    for one in result.cells:
        base = one.step if one.press == NO_PRESS else base
        ratio = "" if base is None else f"{one.step / base:.2f}"
        spread, sizes = _spread(one.decode), (one.held / MIB, one.peak / MIB)
        of_copy = 100 * one.bandwidth / result.copy
        seconds = (statistics.median(one.prefill), 100 * one.share, 1000 * one.step)
        what = (one.press, one.length, one.batch_size, one.forks)
        lines.append((*what, *seconds, spread, ratio, *sizes, of_copy))
    widths = [48, *[None] * (len(HEADERS) - 1)]
    formats = ("", "", "", "", ".2f", ".2f", ".1f", "", "", ".1f", ".0f", ".0f")
    table = tabulate(lines, headers=HEADERS, floatfmt=formats, maxcolwidths=widths)
    return f"{result.machine}; a copy moves {result.copy / 1e9:.0f} GB/s\n\n{table}"


def write_json(result: BenchResult, path: str) -> None:
    """Write the result to a file."""
    Path(path).write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")


def _check_lengths(model: PreTrainedModel, options: BenchOptions) -> None:
    trained = trained_length(model)
    longest = max(options.lengths)
    if trained is not None and longest > trained and not options.beyond_trained_length:
        raise CachepressError(
            f"lengths: got {longest}, but the model was trained for {trained} tokens: ask for "
            "--beyond-trained-length to time it anyway"
        )


def _repeat(
    model: PreTrainedModel,
    ids: Tensor,
    presses: Sequence[BasePress | None],
    timings: Sequence[Timing],
    options: BenchOptions,
    bar: tqdm,
) -> None:
    """Prefill a context under each press, then decode tokens, those of all presses interleaved."""
    length, batch, forks = timings[0].length, timings[0].batch_size, timings[0].forks
    context = _contexts(ids, length, batch).to(model.device)
    caches = []
    for press, timing in zip(presses, timings, strict=True):
        bar.set_postfix_str(f"{length} tokens, {timing.press[:40]}", refresh=True)
        caches.append(_prefill(model, context, press, timing, options))
        bar.update()
    caches = [fork(cache, forks) if forks > 1 else cache for cache in caches]
    for cache, timing in zip(caches, timings, strict=True):
        timing.read = bytes_of_step(model, cache)
    token = context[:, :1].repeat_interleave(forks, dim=0)
    with torch.no_grad():
        for step in range(options.steps + 1):
            for cache, timing in zip(caches, timings, strict=True):
                with Stopwatch(model.device) as stopwatch:
                    model(token, **{cache_argument(model): cache})
                if step:  # The first one allocates.
                    timing.decode.append(stopwatch.seconds)


def _prefill(
    model: PreTrainedModel,
    context: Tensor,
    press: BasePress | None,
    timing: Timing,
    options: BenchOptions,
) -> Cache:
    reading, scoring = Stopwatch(model.device), Stopwatch(model.device)
    with peak_memory(model.device) as peak, reading:
        cache = prefill(
            model,
            context,
            press,
            chunk_size=options.prefill_chunk_size,
            mode="exact" if press is None else options.prefill_mode,
            storage="full" if press is None else options.storage,
            question=None if press is None else min(_QUESTION, context.shape[1]),
            stopwatch=scoring,
        )
    timing.prefill.append(reading.seconds)
    timing.scoring.append(scoring.seconds)
    timing.held = size_of(cache).bytes_after
    timing.peak = max(timing.peak, peak[0])
    return cache


def _model_and_text(options: BenchOptions) -> tuple[PreTrainedModel, Tensor]:
    """Load the model, with token ids of English prose; of a random model, random ones."""
    if options.config is None:
        trust = {"trust_remote_code": options.trust_remote_code}
        model, tokenizer = load(
            options.model, dtype=options.dtype, device=options.device, model_kwargs=trust
        )
        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
        return model, torch.tensor(tokenizer(text, verbose=False).input_ids)
    model = random_model(options.config, options.layers, options.dtype, options.device)
    return model, torch.randint(3, model.config.vocab_size, (65536,))


def _contexts(ids: Tensor, length: int, batch: int) -> Tensor:
    """Cut ``[batch, length]`` token ids from the text, repeated if it is too short."""
    needed = length * batch
    return ids.repeat(-(-needed // len(ids)))[:needed].view(batch, length)


def _spread(seconds: list[float]) -> str:
    """Format the interquartile range of step times, in ms."""
    if len(seconds) < 2:
        return ""
    low, _, high = statistics.quantiles(seconds, n=4)
    return f"{1000 * low:.1f} to {1000 * high:.1f}"
