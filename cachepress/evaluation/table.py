"""Results of several runs as one table."""

from collections.abc import Mapping, Sequence

from tabulate import tabulate

HEADERS = (
    "press",
    "ratio",
    "score",
    "95 % interval",
    "cache before",
    "cache after",
    "prefill s",
    "tokens/s",
)


def results_table(rows: Sequence[tuple[str, Mapping]], style: str = "simple") -> str:
    """A line a run: its name, and its metrics as ``EvaluationRunner`` returns them."""
    return tabulate(
        [_line(name, metrics) for name, metrics in rows],
        headers=HEADERS,
        tablefmt=style,
        colalign=("left", *["right"] * (len(HEADERS) - 1)),
        disable_numparse=True,
    )


def task_table(metrics: Mapping, style: str = "simple") -> str:
    """A line a task: score, interval and number of samples."""
    rows = [
        (task, f"{e['mean']:.3f}", _interval(e), e["samples"], e["contexts"])
        for task, e in metrics["tasks"].items()
    ]
    headers = ("task", "score", "95 % interval", "samples", "contexts")
    return tabulate(
        rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=("left",)
    )


def _line(name: str, metrics: Mapping) -> list[str]:
    return [
        name,
        f"{metrics['compression_ratio']:.3f}",
        f"{metrics['score']['mean']:.3f}",
        _interval(metrics["score"]),
        _mib(metrics["cache_bytes_before"]),
        _mib(metrics["cache_bytes_after"]),
        f"{metrics['prefill_seconds']:.2f}",
        f"{metrics['decode_tokens_per_second']:.1f}",
    ]


def _interval(score: Mapping) -> str:
    return f"{score['low']:.2f} to {score['high']:.2f}"


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
