"""Distributes the work of a sweep: to this process, to other processes, or to a Ray cluster."""

import math
import multiprocessing
import os
import pickle
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

import torch

from cachepress.errors import CachepressError, out_of_memory
from cachepress.evaluation.answering import Answerer, Found
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.run import Run
from cachepress.evaluation.samples import Context
from cachepress.hf.types import PreTrainedModel, PreTrainedTokenizerBase
from cachepress.interrupts import children_ignore_sigint, start_worker
from cachepress.limits import is_out_of_memory
from cachepress.models.loading import be_quiet, load

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

    import ray

T = TypeVar("T")
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
MOST_LOSSES = 3
"""Times that work is given out anew without any result in between."""


class Job(NamedTuple):
    """Evaluations of one model and data set, with all contexts that they answer questions about."""

    configs: Sequence[EvaluationConfig]
    contexts: Sequence[Context]


class Unit(NamedTuple):
    """Unit of work: a context, and the evaluations whose answers to it are missing."""

    context: Context
    configs: tuple[EvaluationConfig, ...]


class Answered(NamedTuple):
    """Answers by the folder of their run, and the error that ended the unit, if any."""

    found: list[tuple[Path, Found]]
    error: CachepressError | None = None


@dataclass(frozen=True)
class WorkerOptions:
    """Options of workers.

    Attributes:
        batch_size: most sequences that are decoded at once.
        kl: whether divergences are measured.
        workers: how many work at the same time.
        shares: whether runs share the reading of a context; else each reads for itself, which also
            tells the memory that it takes.
    """

    batch_size: int = 128
    kl: bool = False
    workers: int = 1
    shares: bool = True


class Worker:
    """Holds a model, and generates answers unit by unit.

    Args:
        options: how.
        rank: number of this worker; says which of several GPUs is its own.
        threads: CPU threads; None for torch's own choice.
        loaded: a model and its tokenizer for all units; None for those that their configs name.
    """

    def __init__(
        self,
        options: WorkerOptions,
        rank: int = 0,
        threads: int | None = None,
        loaded: Loaded | None = None,
    ) -> None:
        self._options, self._rank, self._loaded = options, rank, loaded
        self._kept: tuple[object, Answerer] | None = None
        if threads is not None:
            torch.set_num_threads(threads)

    def check(self, job: Job) -> dict[Path, str]:
        """Refuse contexts that are too long; say why presses do not fit the model, by folder."""
        runs = [Run(config) for config in job.configs]
        return self._answerer(job.configs[0]).check(runs, job.contexts)

    def answer(self, unit: Unit) -> Answered:
        """Answer a unit, all evaluations at once."""
        parts = list(self.answers(unit))
        error = next((part.error for part in parts if part.error is not None), None)
        return Answered([found for part in parts for found in part.found], error)

    def answers(self, unit: Unit) -> Iterator[Answered]:
        """Answer a unit, and yield the answers of each evaluation."""
        runs = [Run(config) for config in unit.configs]
        try:
            answerer = self._answerer(unit.configs[0])
            if self._options.shares:
                found = answerer.together(runs, unit.context)
            else:
                found = ((run, answerer.alone(run, unit.context)) for run in runs)
            for run, answers in found:
                yield Answered([(run.folder, answers)])
        except CachepressError as error:
            yield Answered([], error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            yield Answered([], out_of_memory(error))

    def _answerer(self, config: EvaluationConfig) -> Answerer:
        device = _device_of(self._rank, config.device)
        which = (config.model, config.dtype, device, repr(config.loading))
        if self._kept is None or (self._kept[0] != which and self._loaded is None):
            self._kept = None
            model, tokenizer = self._loaded or load(
                config.model, dtype=config.dtype, device=device, model_kwargs=config.loading
            )
            options = self._options
            self._kept = which, Answerer(model, tokenizer, options.batch_size, options.kl)
        return self._kept[1]


class Executor(ABC):
    """Context manager that starts workers, and distributes units to them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    @abstractmethod
    def check(self, job: Job) -> dict[Path, str]:
        """Check a job before any work is done; see ``Worker.check``."""

    @abstractmethod
    def run(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Answered]]:
        """Yield units with their answers as they come; a unit can come in parts."""


class Serial(Executor):
    """Executor in this process, which can use a model that is loaded already."""

    def __init__(self, options: WorkerOptions, loaded: Loaded | None = None) -> None:
        self._worker = Worker(options, loaded=loaded)

    def check(self, job: Job) -> dict[Path, str]:
        """Check a job with this process's model."""
        return self._worker.check(job)

    def run(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Answered]]:
        """Answer units one by one, and yield each in parts, so that a crash loses little."""
        for unit in units:
            for part in self._worker.answers(unit):
                yield unit, part


_WORKER: Worker | None = None


def _start(options: WorkerOptions, rank: "Synchronized[int]") -> None:
    global _WORKER
    # Bars of several processes would overwrite each other; the command has its own.
    be_quiet()
    with rank.get_lock():
        own = rank.value
        rank.value += 1
    _WORKER = Worker(options, own, _threads(options.workers))


def _answer(unit: Unit) -> Answered:
    assert _WORKER is not None
    return _WORKER.answer(unit)


def _check(job: Job) -> dict[Path, str]:
    assert _WORKER is not None
    return _WORKER.check(job)


class Processes(Executor):
    """Executor in several processes of this machine, each with a model, and a GPU if there is one.

    A process that dies takes the others with it; what they were at is given out anew.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._pool is not None
        if error[0] is not None:
            for child in multiprocessing.active_children():
                child.terminate()
        self._pool.shutdown(cancel_futures=True)

    def check(self, job: Job) -> dict[Path, str]:
        """Check a job in one of the processes."""
        try:
            return self._submit(_check, job).result()
        except BrokenProcessPool as error:
            raise _lost(1) from error

    def run(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Answered]]:
        """Yield units as they are done, each exactly once."""
        left, losses = deque(units), 0
        at: dict[Future, Unit] = {}
        while left or at:
            try:
                while left and len(at) < self._options.workers:
                    at[self._submit(_answer, left[0])] = left[0]
                    left.popleft()
                done, _ = wait(at, return_when=FIRST_COMPLETED)
                for future in done:
                    answered = future.result()
                    yield at.pop(future), answered
                    losses = 0
            except BrokenProcessPool:
                losses += 1
                if losses > MOST_LOSSES:
                    raise _lost(losses) from None
                left.extendleft(at.values())
                at.clear()
                self._open()

    def _submit(self, work: Callable[..., T], *args: object) -> Future[T]:
        assert self._pool is not None
        with children_ignore_sigint():  # The pool starts its processes when there is work for them.
            return self._pool.submit(work, *args)

    def _open(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        context = multiprocessing.get_context("spawn")
        start = pickle.dumps(partial(_start, self._options))
        self._pool = ProcessPoolExecutor(
            self._options.workers, context, start_worker, (start, context.Value("i", 0))
        )


class Ray(Executor):
    """Executor on a Ray cluster: the one that ``RAY_ADDRESS`` names, or one on this machine.

    Each actor holds a model. An actor that is lost is started again, and its unit is done again.
    """

    def __init__(self, options: WorkerOptions) -> None:
        try:
            import ray
        except ImportError as error:
            raise CachepressError(
                'the ray executor needs Ray: pip install "cachepress[ray]"'
            ) from error
        self._ray, self._options, self._owned = ray, options, False

    def __enter__(self) -> Self:
        ray, workers = self._ray, self._options.workers
        if not ray.is_initialized():
            local = "RAY_ADDRESS" not in os.environ
            # They do the work; Ray's own niceness of 15 is for what runs beside it.
            os.environ.setdefault("RAY_worker_niceness", "0")
            room = {"num_cpus": max(workers, os.cpu_count() or 1)} if local else {}
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="error", **room)
            self._owned = True
        room = ray.cluster_resources()
        if room.get("CPU", 0) < workers:
            raise CachepressError(
                f"workers: got {workers}, but the Ray cluster has {room.get('CPU', 0):.0f} CPUs"
            )
        gpus = 1 / math.ceil(workers / room["GPU"]) if room.get("GPU") else 0
        kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1)(Worker)
        threads = _threads(workers)
        self.actors = [kind.remote(self._options, rank, threads) for rank in range(workers)]
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self.actors:
            self._ray.kill(actor)
        if self._owned:
            self._ray.shutdown()

    def check(self, job: Job) -> dict[Path, str]:
        """Check a job in one of the actors."""
        try:
            return self._get(self.actors[0].check.remote(job))
        except self._ray.exceptions.RayActorError as error:
            raise _lost(1) from error

    def run(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Answered]]:
        """Yield units as they are done, each exactly once."""
        left, losses = deque(units), 0
        at = {}
        idle = deque(self.actors)
        while left or at:
            while left and idle:
                actor, unit = idle.popleft(), left.popleft()
                at[actor.answer.remote(unit)] = (actor, unit)
            (ready,), _ = self._ray.wait(list(at), num_returns=1)
            actor, unit = at.pop(ready)
            idle.append(actor)
            try:
                answered = self._get(ready)
            except self._ray.exceptions.RayActorError:
                losses += 1
                if losses > MOST_LOSSES:
                    raise _lost(losses) from None
                left.appendleft(unit)
                continue
            losses = 0
            yield unit, answered

    def _get(self, reference: "ray.ObjectRef[T]") -> T:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CachepressError):
                raise error.cause from error
            raise


EXECUTORS: dict[str, Callable[[WorkerOptions], Executor]] = {
    "serial": Serial,
    "process": Processes,
    "ray": Ray,
}


def _device_of(rank: int, wanted: str | None) -> str | None:
    """Choose a worker's device: one of the GPUs, in turns, where none is named.

    It becomes the process's own, so that nothing of it lands on the first one.
    """
    if wanted not in (None, "cuda") or not torch.cuda.is_available():
        return wanted
    place = rank % torch.cuda.device_count()
    torch.cuda.set_device(place)
    return f"cuda:{place}"


def _threads(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)


def _lost(times: int) -> CachepressError:
    return CachepressError(
        f"workers died {times} times in a row, most likely for want of memory: give fewer "
        "--workers or a smaller --batch-size; what was answered is on disk"
    )
