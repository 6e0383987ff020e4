"""Press overhead on prefill, decode time, and the cost of several questions.

Runs are interleaved and repeated, and medians are compared: a shared machine is never quiet.

    python scripts/bench.py --model smollm2-135m --repeats 5
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pydoc_data import topics

import torch
from tabulate import tabulate
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

import cachepress as cp
from cachepress.hf import cache_argument
from cachepress.models import load
from cachepress.pipeline import read_context as prefill

SNAPKV = cp.SnapKVPress(0.5)


def main() -> None:
    options = _options()
    model, tokenizer = load(options.model)
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = torch.tensor([tokenizer(text, verbose=False).input_ids])
    print(
        f"{options.model}, {model.dtype}, {model.device.type}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}"
    )
    _prefill(model, ids[:, : options.length], options.repeats)
    _decode(model, ids[:, : options.length], options.repeats, options.steps)
    _questions(model, ids[:, :1000], options.repeats, options.steps)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=4096, help="tokens of context")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="tokens to decode")
    return parser.parse_args()


def _prefill(model: PreTrainedModel, ids: torch.Tensor, repeats: int) -> None:
    """Scoring is timed inside the very forward that it slows down."""
    whole, scoring = [], []
    for _ in range(repeats):
        with _timed_settles() as spent:
            _, seconds = prefill(model, ids, SNAPKV)
        whole.append(seconds)
        scoring.append(sum(spent))
    shares = [s / (w - s) for w, s in zip(whole, scoring, strict=True)]
    _, plain = prefill(model, ids, None)
    print(f"\nprefill of {ids.shape[1]} tokens, {SNAPKV!r}, {repeats} runs")
    rows = [
        ("prefill with SnapKV, s", *_spread(whole)),
        ("of it scoring and dropping, s", *_spread(scoring)),
        ("overhead, %", *_spread([100 * share for share in shares])),
        ("one prefill without a press, s", plain, plain, plain),
    ]
    print(tabulate(rows, headers=("", "median", "least", "most"), floatfmt=".3f"))


class _timed_settles:
    """Collects the seconds that settling takes, layer by layer."""

    def __enter__(self) -> list[float]:
        import cachepress.hf as hf

        self._hf, self._real, spent = hf, hf._settle_layer, []

        def timed(*args: object) -> None:
            start = time.perf_counter()
            self._real(*args)
            spent.append(time.perf_counter() - start)

        hf._settle_layer = timed
        return spent

    def __exit__(self, *error: object) -> None:
        self._hf._settle_layer = self._real


def _decode(model: PreTrainedModel, ids: torch.Tensor, repeats: int, steps: int) -> None:
    caches = {
        "transformers' own cache": prefill(model, ids, None)[0],
        "ours, nothing dropped": prefill(model, ids, cp.KnormPress(0.0))[0],
        "ours, SnapKV 0.5": prefill(model, ids, SNAPKV)[0],
    }
    times = _interleaved(
        {name: _steps(model, cache, 1, steps) for name, cache in caches.items()}, repeats
    )
    base = statistics.median(times["transformers' own cache"])
    rows = [
        (
            name,
            *(1000 * x / steps for x in _spread(t)),
            statistics.median(t) / base,
            cp.size_of(caches[name]).bytes_after / 2**20,
        )
        for name, t in times.items()
    ]
    print(f"\ndecoding {steps} tokens after {ids.shape[1]}, {repeats} interleaved runs, ms a token")
    headers = ("", "median", "least", "most", "ratio", "MiB held")
    print(tabulate(rows, headers=headers, floatfmt=".2f"))


def _questions(model: PreTrainedModel, ids: torch.Tensor, repeats: int, steps: int) -> None:
    cache, _ = prefill(model, ids, SNAPKV)
    runs = {f"{n} question{'s' * (n > 1)}": _steps(model, cache, n, steps) for n in (1, 8)}
    times = _interleaved(runs, repeats)
    base = statistics.median(times["1 question"])
    rows = [(n, *_spread(t), statistics.median(t) / base) for n, t in times.items()]
    print(f"\n{steps} tokens for each question, {ids.shape[1]} tokens of context, SnapKV 0.5")
    headers = ("", "median s", "least", "most", "ratio")
    print(tabulate(rows, headers=headers, floatfmt=".3f"))


def _steps(model: PreTrainedModel, cache: Cache, n: int, steps: int) -> Callable[[], None]:
    """Decode ``steps`` tokens for ``n`` sequences on a fork of the cache, which is timed too."""

    @torch.no_grad()
    def run() -> None:
        forked = cp.fork(cache, n)
        token = torch.full((n, 1), 100, device=model.device)
        for _ in range(steps):
            logits = model(token, **{cache_argument(model): forked}).logits
            token = logits[:, -1:].argmax(-1)
        token.tolist()

    return run


def _interleaved(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


if __name__ == "__main__":
    main()
