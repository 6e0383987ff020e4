"""One reading of a prompt that many presses look at."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from cachepress.cache.batch import fork, size_of, stores, trim
from cachepress.cache.codec import Codec
from cachepress.call import AttentionCall, Place
from cachepress.engine import Pending, compress, compress_together
from cachepress.errors import CachepressError
from cachepress.hf.attention import attach
from cachepress.hf.capture import Capture
from cachepress.hf.chunks import tokenizer_of
from cachepress.hf.reconstruction import Reconstructor, Waiting
from cachepress.hf.session import codec_of, instruct, prepared
from cachepress.hf.wiring import cache_argument, install_stores
from cachepress.measure import Stopwatch
from cachepress.press import BasePress
from cachepress.query_stats import QueryStats
from cachepress.schedules import Step
from cachepress.view import Needs

if TYPE_CHECKING:
    from cachepress.press import BasePress


@dataclass
class _Hook:
    """Observes one layer of the prompt's forward for every kind of press.

    Attributes:
        shared: the prefill that the presses share.
        place: where the layer is.
        traces: what each kind of press observes.
        last: whether the forward is the prompt's last chunk.
        call: the last attention call, as it can be used when the forward is over.
    """

    shared: "SharedPrefill"
    place: Place
    traces: dict[Needs, QueryStats]
    last: bool = False
    call: AttentionCall | None = None

    differentiates = False

    @property
    def features(self) -> Capture:
        """What the model's hooks keep of the forward."""
        return self.shared.capture

    def observe(self, call: AttentionCall) -> None:
        """Add the call to the statistics of every kind of press."""
        for needs, query_stats in self.traces.items():
            with self.shared.observing[needs]:
                query_stats.end += call.query.shape[2]
                if needs.observes:
                    query_stats.add(call)
                if self.last and needs.rotates:
                    call.rotary()
        if self.last:
            rotates = any(needs.rotates for needs in self.traces)
            projects = any(needs.projection for needs in self.traces)
            self.call = call.when_over(rotates, projects)


@dataclass
class SharedPrefill:
    """Reads a prompt once, then gives the cache that each press would have left.

    Nothing is dropped while the prompt is read; each press settles a fork of the whole cache, and
    presses that replay look at a replay on it, one for all ratios. The outcome is that of
    ``cachepress.prefill`` in mode "exact".

    Args:
        model: a transformers decoder model.
        presses: presses that will be asked for; see ``shares``.
        tokenizer: the model's, for presses that replay.

    Attributes:
        cache: the whole cache, after ``read``.
        whole_bytes: what it needed before the first fork.
        seconds: time of the reading, without what was observed for presses.
        observing: the time of that, for each kind of press.

    Raises:
        CachepressError: if a press does not fit the model.
    """

    model: PreTrainedModel
    presses: Sequence["BasePress"]
    tokenizer: PreTrainedTokenizerBase | None = None
    cache: Cache = field(init=False)
    whole_bytes: int = field(init=False, default=0)
    seconds: float = field(init=False, default=0.0)
    observing: dict[Needs, Stopwatch] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for press in self.presses:
            if not shares(press):
                raise CachepressError(f"{press!r} looks at the question: it reads for itself")
        self._ready = [(press, prepared(press, self.model)) for press in self.presses]
        acting = [ready.acting(_step(1)) for _, ready in self._ready]
        self._needs = list(dict.fromkeys(press.needs.observed for press in acting))
        self.capture = Capture(acting, self.model)
        self._layers: list[_Hook] = []
        self._replays: dict[str, tuple[list[Waiting], float]] = {}

    def read(self, ids: Tensor, chunk_size: int | None = None) -> None:
        """Read a prompt ``[1, T]``, in chunks of so many tokens."""
        attach(self.model)
        decoder, n = self.model.get_decoder(), ids.shape[1]
        self.cache = DynamicCache(config=decoder.config)
        self._layers.clear()
        self._replays.clear()
        self.observing = {needs: Stopwatch(self.model.device) for needs in self._needs}
        self._ids = ids.to(self.model.device)
        reading = Stopwatch(self.model.device)
        with torch.no_grad(), self.capture.hooked(), reading:
            for begin in range(0, n, chunk_size or n):
                end = min(begin + (chunk_size or n), n)
                self._watch(begin, end, last=end == n)
                inputs = {cache_argument(decoder): self.cache, "use_cache": True}
                decoder(input_ids=self._ids[:, begin:end], **inputs)
                trim(self.cache)
                self.capture.clear()
        self.seconds = reading.seconds - sum(x.seconds for x in self.observing.values())
        for store in stores(self.cache):
            store.reads_whole = False
        self.whole_bytes = size_of(self.cache).bytes_before

    def compressed(self, press: "BasePress", storage: str | Codec = "full") -> tuple[Cache, float]:
        """The cache that a press leaves, and the seconds that it adds to the reading.

        Args:
            press: one of ``presses``.
            storage: how kept rows are stored.
        """
        ready = next(ready for given, ready in self._ready if given == press)
        step, branch = _step(self._ids.shape[1]), fork(self.cache)
        acting = ready.acting(step)
        instruct(stores(branch), ready, codec_of(ready, storage))
        if not ready.schedule.due(step):
            for store in stores(branch):
                store.mark_skipped(step.new)
            return branch, 0.0
        layers, seconds = self._repeated(acting)
        with Stopwatch(self.model.device) as compressing:
            self._compress(acting, branch, layers)
        seconds += compressing.seconds + self.observing[acting.needs.observed].seconds
        return branch, seconds

    def _watch(self, begin: int, end: int, last: bool) -> None:
        found = install_stores(self.cache, self.model)
        rope = torch.arange(begin, end, device=self.model.device).unsqueeze(0)
        for depth, (index, store) in enumerate(found.items()):
            if not begin:
                traces = {needs: QueryStats(needs, 0) for needs in self._needs}
                self._layers.append(_Hook(self, Place(index, depth, len(found), rope), traces))
            layer = self._layers[depth]
            layer.place, layer.last = layer.place._replace(rope=rope), last
            store.hook, store.reads_whole = layer, True

    def _repeated(self, press: BasePress) -> tuple[list[Waiting], float]:
        """The layers as a press has to see them, and the seconds that a replay for it took."""
        layers = []
        for store, layer in zip(stores(self.cache), self._layers, strict=True):
            assert layer.call is not None
            call = replace(layer.call, read=store.snapshot.rows())
            layers.append(Waiting(press, store, call, layer.traces[press.needs.observed]))
        if press.needs.reconstruction is None:
            return layers, 0.0
        key = _without_ratio(press)
        if key not in self._replays:
            with Stopwatch(self.model.device) as repeating:
                repeated = self._repeat(press, layers)
            self._replays[key] = repeated, repeating.seconds
        repeated, seconds = self._replays[key]
        return [layer._replace(press=press) for layer in repeated], seconds

    def _repeat(self, press: BasePress, layers: list[Waiting]) -> list[Waiting]:
        tokenizer = self.tokenizer
        if (
            press.needs.reconstruction is not None
            and press.needs.reconstruction.speaks
            and tokenizer is None
        ):
            tokenizer = tokenizer_of(self.model)
        repeater = Reconstructor(press, self.model, tokenizer, self.capture)
        repeater.read(self.cache, self._ids)
        for layer in layers:
            repeater.wait(layer._replace(query_stats=copy.copy(layer.query_stats)))
        with torch.no_grad(), self.capture.hooked():
            repeated = repeater.repeat()
        self.capture.clear()
        return repeated

    def _compress(self, press: BasePress, branch: Cache, layers: list[Waiting]) -> None:
        waiting: list[Pending] = []
        with torch.no_grad():
            for store, layer in zip(stores(branch), layers, strict=True):
                pending = compress(press, store, layer.call, copy.copy(layer.query_stats))
                store.mark_scored()
                waiting += [] if pending is None else [pending]
            if waiting:
                compress_together(press, waiting)


def shares(press: "BasePress") -> bool:
    """Whether a press can look at a reading that it shares with others."""
    return not press.needs.question


def _step(n: int) -> Step:
    return Step(seen=0, new=n, since=n, prompt=True)


def _without_ratio(press: BasePress) -> str:
    """What a replay depends on: a scorer never reads its own ratio."""
    try:
        return repr(press.with_ratio(0.0))  # type: ignore
    except CachepressError:
        return repr(press)
