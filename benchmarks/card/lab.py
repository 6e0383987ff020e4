"""What sections share: the models of one shape, caches of them, and the bandwidth of a copy."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

import cachepress as cp
from benchmarks.card.plan import Job
from benchmarks.card.records import LINE, Values
from cachepress.cache.joined import join
from cachepress.measure import copy_bandwidth
from cachepress.models.shapes import SHAPES

TINY_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
}
ROOM = 262144
"""Tokens that the model has room for; its weights are random, so that it was trained for none."""
GIB = 2**30
RECORDED, EAGER, COMPILED = "recorded", "eager", "compiled"
Cells = Iterator[tuple[str, Callable[[], Values]]]


@dataclass(frozen=True)
class Kind:
    """A way to fill a cache.

    Attributes:
        name: in tables.
        press: its spelling; None for transformers' ``DynamicCache``.
        storage: how pairs are stored.
    """

    name: str
    press: str | None = None
    storage: str = "full"


DYNAMIC = Kind("DynamicCache")
WHOLE = Kind("whole, ours", "KnormPress(0.0)")
SNAP_75 = Kind("SnapKV 0.75", "SnapKVPress(0.75)")
ADA_75 = Kind("AdaKV(SnapKV) 0.75", "AdaKVPress(SnapKVPress(0.75))")
ADA_90 = Kind("AdaKV(SnapKV) 0.9", "AdaKVPress(SnapKVPress(0.9))")
INT4 = Kind("whole, int4", "KnormPress(0.0)", "int4")
QUEST = Kind("Quest, 64 pages", "QuestPress(KnormPress(0.0), pages=64)")
KVZIP = Kind("KVzip 0.75", "KVzipPress(0.75)")


class Lab:
    """Makes models and caches when a cell first needs them, and frees what others would miss.

    Args:
        job: what is to be measured.
    """

    def __init__(self, job: Job) -> None:
        count_replays()
        self.job, self.sizes, self.device = job, job.sizes, torch.device(job.device)
        self._models: dict[int, PreTrainedModel] = {}
        self._single: dict[tuple[int, Kind], Cache] = {}
        self._batch: tuple[tuple[int, int, Kind], Cache] | None = None
        self._copy: float | None = None

    @property
    def is_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device.type == "cuda"

    @property
    def copy(self) -> float:
        """Bytes a second of a copy on this device, those read and those written."""
        if self._copy is None:
            self._copy = copy_bandwidth(self.device)
        return self._copy

    def model(self, layers: int | None = None) -> PreTrainedModel:
        """Make the model with some of its layers; other models are freed where it needs room."""
        layers = layers or self.sizes.layers
        if layers not in self._models:
            try:
                self._models[layers] = self._made(layers)
            except RuntimeError:
                self.forget_models()
                self._models[layers] = self._made(layers)
        return self._models[layers]

    def _made(self, layers: int) -> PreTrainedModel:
        """Make a model with random weights."""
        kind, shape = SHAPES["llama-3.1-8b"]
        shape = {**shape, **(TINY_SHAPE if self.job.tiny else {})}
        shape |= {"num_hidden_layers": layers, "max_position_embeddings": ROOM}
        torch.manual_seed(0)
        with self.device:
            config = AutoConfig.for_model(kind, **shape)
            dtype = torch.bfloat16 if self.is_gpu else torch.float32
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        model.generation_config.eos_token_id = None
        return model

    def ids(self, length: int, batch: int = 1) -> Tensor:
        """Draw token ids ``[batch, length]``, the same every time."""
        generator = torch.Generator().manual_seed(length)
        return torch.randint(5, 200, (batch, length), generator=generator).to(self.device)

    def prefill(self, kind: Kind, length: int, layers: int | None = None) -> Cache:
        """Read one text into a new cache."""
        model, ids = self.model(layers), self.ids(length)
        if kind.press is None:
            return cp.prefill(model, ids)
        return cp.prefill(model, ids, **press_options(cp.parse(kind.press), kind.storage))

    def cache(self, kind: Kind, length: int, batch: int = 1) -> Cache:
        """Return a cache of a batch of texts, each with pairs of its own in memory.

        Caches of other lengths are freed. So are compressed ones before a ``DynamicCache`` is
        measured: while one lives, the model's attention is ours.
        """
        if self._batch is not None and self._batch[0] != (batch, length, kind):
            self._batch = None
        for n, other in list(self._single):
            if n != length or (other == DYNAMIC) != (kind == DYNAMIC):
                del self._single[n, other]
        self.tidy()
        if (length, kind) not in self._single:
            self._single[length, kind] = self.prefill(kind, length)
        single = self._single[length, kind]
        if batch == 1:
            return single
        if self._batch is None:
            self._check_room(single, batch)
            many = cp.fork(single, batch) if kind == DYNAMIC else join([[single] * batch])
            self._batch = (batch, length, kind), many
        return self._batch[1]

    def healthy(self) -> bool:
        """Tell whether the device still computes: after some errors it does not."""
        try:
            self.tidy()
            return bool(torch.ones(2, device=self.device).sum() == 2)
        except RuntimeError:
            return False

    def forget(self) -> None:
        """Free all caches."""
        self._single.clear()
        self._batch = None
        self.tidy()

    def tidy(self) -> None:
        """Give memory that is free back to the device."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def forget_models(self) -> None:
        """Free all models as well."""
        self.forget()
        self._models.clear()
        self.tidy()

    def _check_room(self, single: Cache, batch: int) -> None:
        """Raise MemoryError where a batch does not fit; transformers copies each layer once."""
        if not self.is_gpu:
            return
        needed = cp.size_of(single).bytes_after * batch
        free, _ = torch.cuda.mem_get_info(self.device)
        if needed > free:
            raise MemoryError(
                f"does not fit: the cache needs {needed / GIB:.0f} GiB, {free / GIB:.0f} are free"
            )


def press_options(press: object, storage: str = "full") -> dict[str, object]:
    """Return the arguments of ``cachepress.prefill`` that a press needs."""
    options: dict[str, object] = {"press": press, "storage": storage}
    needs = press.needs  # type: ignore
    if needs.question:
        options["question"] = 8
    if needs.reconstruction is not None:
        from tests.tiny import tokenizer

        options["tokenizer"] = tokenizer()
    return options


@contextmanager
def stepping(mode: str) -> Iterator[None]:
    """Take steps as a mode says; the usual one is back at the end."""
    cp.configure(recorded=mode != EAGER, compile=mode == COMPILED)
    try:
        yield
    finally:
        cp.configure(recorded=True, compile=False)


_replay = torch.cuda.CUDAGraph.replay
_count = 0


def _counted(graph: torch.cuda.CUDAGraph) -> None:
    global _count
    _count += 1
    _replay(graph)


def count_replays() -> None:
    """Count the replays of CUDA graphs from now on: a recording keeps the method that it found."""
    torch.cuda.CUDAGraph.replay = _counted


def replays() -> int:
    """Return how many replays were counted so far."""
    return _count


def left_out(why: str) -> Values:
    """Make the cell of what was not measured."""
    return {LINE: why}
