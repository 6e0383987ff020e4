"""Reads a prompt once for many presses, and compresses a fork of the cache by each of them.

The prefill is the expensive part of an evaluation, and is the same whatever press follows. The
result is the same as when each press had a prefill of its own.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from cachepress.cache.batch import compressed_layers, fork, size_of, trim
from cachepress.cache.codec import Codec
from cachepress.call import AttentionCall, Place
from cachepress.engine import Pending, compress, compress_together
from cachepress.errors import CachepressError
from cachepress.hf.angles import as_one_forward
from cachepress.hf.blocks import unobserved
from cachepress.hf.capture import Capture
from cachepress.hf.chunks import tokenizer_for
from cachepress.hf.forward import instruct
from cachepress.hf.reconstruction import Reconstructor, Waiting
from cachepress.hf.session import codec_of, prepared
from cachepress.hf.wiring import cache_argument, install_layers, text_decoder
from cachepress.measure import Stopwatch
from cachepress.press import BasePress
from cachepress.query_stats import QueryStats
from cachepress.schedules import Step
from cachepress.view import Needs


@dataclass
class _Hook:
    """Observes one layer in the shared prefill, for all presses with the same needs at once.

    Attributes:
        shared: the shared prefill.
        place: where in the model and in the text the layer is.
        query_stats: the query statistics by what presses need of them.
        last: whether the forward is the prompt's last chunk.
        call: the last attention call, as it can be used when the forward is over.
    """

    shared: "SharedPrefill"
    place: Place
    query_stats: dict[Needs, QueryStats]
    last: bool = False
    call: AttentionCall | None = None

    @property
    def features(self) -> Capture:
        """Captures what the presses need of the forward besides the call."""
        return self.shared.capture

    def observe(self, call: AttentionCall) -> None:
        """Add the call to all query statistics."""
        for needs, stats in self.query_stats.items():
            with self.shared.observing[needs]:
                stats.end += call.query.shape[2]
                if needs.observes:
                    stats.add(call)
        if self.last:
            rotates = any(needs.rotates for needs in self.query_stats)
            projects = any(needs.projection for needs in self.query_stats)
            self.call = call.when_over(rotates, projects)


@dataclass
class SharedPrefill:
    """Reads a prompt once, then makes the compressed cache of each press from it.

    Nothing is evicted while the prompt is read; each press compresses a fork of the whole cache.
    For presses that reconstruct the context the model repeats it once for all compression ratios.
    The outcome is that of ``cachepress.prefill`` in mode "exact".

    Args:
        model: a transformers decoder model.
        presses: the presses that ``compressed`` may be called with; see ``shares``.
        tokenizer: the model's, for presses that reconstruct the context.

    Attributes:
        cache: the whole cache, after ``read``.
        whole_bytes: the bytes of it before the first fork.
        seconds: time of the prefill, without what was observed for presses.
        observing: the time of that, by what presses need.

    Raises:
        CachepressError: if a press does not fit the model.
    """

    model: PreTrainedModel
    presses: Sequence[BasePress]
    tokenizer: PreTrainedTokenizerBase | None = None
    cache: Cache = field(init=False)
    whole_bytes: int = field(init=False, default=0)
    seconds: float = field(init=False, default=0.0)
    observing: dict[Needs, Stopwatch] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for press in self.presses:
            if not shares(press):
                raise CachepressError(
                    f"{press!r} observes the question, which differs between answers: got it for a "
                    "shared prefill, use cachepress.prefill"
                )
        self._ready = [(press, prepared(press, self.model)) for press in self.presses]
        acting = [ready.acting(_step(1)) for _, ready in self._ready]
        self._needs = list(dict.fromkeys(press.needs.observed for press in acting))
        self.capture = Capture(acting, self.model)
        self._hooks: list[_Hook] = []
        self._reconstructed: dict[str, tuple[list[Waiting], float]] = {}

    def read(self, ids: Tensor, chunk_size: int | None = None) -> None:
        """Read a prompt ``[1, T]`` into a new cache, in chunks of ``chunk_size`` tokens."""
        decoder, n = text_decoder(self.model), ids.shape[1]
        self.cache = DynamicCache(config=decoder.config)
        self._hooks.clear()
        self._reconstructed.clear()
        self.observing = {needs: Stopwatch(self.model.device) for needs in self._needs}
        self._ids = ids.to(self.model.device)
        prefill = Stopwatch(self.model.device)
        size = chunk_size or n
        whole = as_one_forward(decoder, min(size, n) - 1, n - 1)
        with torch.no_grad(), unobserved(decoder), self.capture.hooked(), whole, prefill:
            for begin in range(0, n, size):
                end = min(begin + size, n)
                self._set_hooks(begin, end, last=end == n)
                inputs = {cache_argument(decoder): self.cache, "use_cache": True}
                decoder(input_ids=self._ids[:, begin:end], **inputs)
                trim(self.cache)
                self.capture.clear()
        self.seconds = prefill.seconds - sum(x.seconds for x in self.observing.values())
        for layer in compressed_layers(self.cache):
            layer.reads_whole = False
        self.whole_bytes = size_of(self.cache).bytes_before

    def compressed(self, press: BasePress, storage: str | Codec = "full") -> tuple[Cache, float]:
        """Compress a fork of the cache by a press.

        Args:
            press: one of ``presses``.
            storage: how kept pairs are stored.

        Returns:
            The compressed cache, and the seconds that the press adds to the prefill.
        """
        ready = next(ready for given, ready in self._ready if given == press)
        step, branch = _step(self._ids.shape[1]), fork(self.cache)
        acting = ready.acting(step)
        instruct(compressed_layers(branch), ready, codec_of(ready, storage))
        if not ready.schedule.due(step):
            for layer in compressed_layers(branch):
                layer.mark_skipped(step.new)
            return branch, 0.0
        layers, seconds = self._observed(acting)
        with Stopwatch(self.model.device) as compressing:
            self._compress(acting, branch, layers)
        seconds += compressing.seconds + self.observing[acting.needs.observed].seconds
        return branch, seconds

    def _set_hooks(self, begin: int, end: int, last: bool) -> None:
        """Set hooks on the layers for the forward of the tokens from ``begin`` to ``end``."""
        layers = install_layers(self.cache, self.model)
        rope = torch.arange(begin, end, device=self.model.device).unsqueeze(0)
        for depth, (index, layer) in enumerate(layers.items()):
            if not begin:
                stats = {needs: QueryStats(needs, 0) for needs in self._needs}
                self._hooks.append(_Hook(self, Place(index, depth, len(layers), rope), stats))
            hook = self._hooks[depth]
            hook.place, hook.last = hook.place._replace(rope=rope), last
            layer.hook, layer.reads_whole = hook, True

    def _observed(self, press: BasePress) -> tuple[list[Waiting], float]:
        """Return the layers with what a press needs, and the seconds of its reconstruction."""
        layers = []
        for layer, hook in zip(compressed_layers(self.cache), self._hooks, strict=True):
            assert hook.call is not None
            call = replace(hook.call, read=layer.snapshot.rows())
            layers.append(Waiting(press, layer, call, hook.query_stats[press.needs.observed]))
        if press.needs.reconstruction is None:
            return layers, 0.0
        key = _without_ratio(press)
        if key not in self._reconstructed:
            with Stopwatch(self.model.device) as repeating:
                found = self._reconstruct(press, layers)
            self._reconstructed[key] = found, repeating.seconds
        found, seconds = self._reconstructed[key]
        return [waiting._replace(press=press) for waiting in found], seconds

    def _reconstruct(self, press: BasePress, layers: list[Waiting]) -> list[Waiting]:
        """Let the model repeat the prompt behind the whole cache, which stays as it is."""
        tokenizer = tokenizer_for(press, self.model, self.tokenizer)
        reconstructor = Reconstructor(
            press, self.model, tokenizer, self.capture, self.cache, self._ids
        )
        for waiting in layers:
            reconstructor.wait(waiting._replace(query_stats=copy.copy(waiting.query_stats)))
        with torch.no_grad(), unobserved(text_decoder(self.model)), self.capture.hooked():
            return list(reconstructor.repeat())

    def _compress(self, press: BasePress, branch: Cache, layers: list[Waiting]) -> None:
        pending: list[Pending] = []
        with torch.no_grad():
            for layer, waiting in zip(compressed_layers(branch), layers, strict=True):
                scored = compress(press, layer, waiting.call, copy.copy(waiting.query_stats))
                layer.mark_scored()
                pending += [] if scored is None else [scored]
            if pending:
                compress_together(press, pending)


def shares(press: BasePress) -> bool:
    """Tell whether a press can share a prefill: whether it needs no question."""
    return not press.needs.question


def _step(n: int) -> Step:
    return Step(seen=0, new=n, since=n, prompt=True)


def _without_ratio(press: BasePress) -> str:
    """Spell a press without its ratio, on which context reconstruction does not depend."""
    try:
        return repr(press.with_ratio(0.0))  # type: ignore
    except CachepressError:
        return repr(press)
