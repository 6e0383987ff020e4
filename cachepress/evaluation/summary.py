"""Results of several runs as one table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean

from tabulate import tabulate

from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.prompts import shortened
from cachepress.evaluation.speed import SpeedLine
from cachepress.evaluation.spreadsheet import SheetCell, estimated, spreadsheet
from cachepress.evaluation.sweep import Result
from cachepress.spec import NO_PRESS, brief

LONGEST_NAME = 72
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

SWEEP_HEADERS = (
    "press",
    "ratio",
    "score",
    "95 % interval",
    "difference to no press",
    "flips",
    "KL",
    "cache",
    "prefill s",
    "press s",
    "tokens/s",
)
EQUAL = 1.15
"""Bytes that count as equal: pages that are not full, and positions, come on top of rows."""
QUALITY_HEADERS = (
    "press",
    "question",
    "dropped",
    "score",
    "95 % interval",
    "difference to no press",
    "cache",
)
SPEED_HEADERS = ("press", "dropped", "cache", "ms a token", "middle half", "times as fast")
RANKING_MEANS = ("mean score", "mean KL", "mean bytes kept")
HOW_TO_READ = (
    "Ratio: share of key-value pairs dropped, measured. Score: mean, with a 95 % interval "
    "clustered by context. Difference: to no press on the same samples, with its interval. Flips: "
    "share of samples that are right in one and wrong in the other. KL: divergence from what the "
    "uncompressed model expects while it says its own answer, nats a token. Cache: bytes allocated "
    "for keys and values. Prefill: median seconds of reading a context; press: those that the "
    "press added. Tokens/s: of one sequence, after the context.\n"
)


def results_table(rows: Sequence[tuple[str, Mapping]], style: str = "simple") -> str:
    """A line a run: its name, and its metrics as ``EvaluationRunner`` returns them."""
    return _table([_line(name, metrics) for name, metrics in rows], HEADERS, style)


def task_table(metrics: Mapping, style: str = "simple") -> str:
    """A line a task: score, interval and number of samples; and what else is reported of it."""
    rows = []
    for task, score in metrics["tasks"].items():
        reported = metrics.get("reported", {}).get(task, {})
        rows += [
            (name, f"{e['mean']:.3f}", _spread(e), e["samples"], e["contexts"])
            for name, e in [(task, score), *((f"{task}: {n}", e) for n, e in reported.items())]
        ]
    headers = ("task", "score", "95 % interval", "samples", "contexts")
    return tabulate(
        rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=("left",)
    )


def cut_text(metrics: Mapping) -> str:
    """How many contexts were cut, and by how much; nothing where none was."""
    if not metrics.get("cut_contexts"):
        return ""
    contexts, tokens = metrics["cut_contexts"], metrics["cut_tokens"]
    return f"{contexts} context{'s' * (contexts != 1)} cut, {tokens:,} tokens in all"


def sweep_table(results: Sequence[Result], style: str = "simple") -> str:
    """A line for each result of a group, the differences to no press beside it."""
    return _table([_sweep_line(result) for result in results], SWEEP_HEADERS, style)


def quality_table(groups: Sequence[Sequence[Result]], style: str = "simple") -> str:
    """A line for each result of all groups: what was asked, and what is left of score and bytes."""
    lines = []
    for group in groups:
        question = "in sight" if group[0].run.config.query_aware else "later"
        for result in group:
            name, ratio, score, spread, difference, _, _, cache, *_ = _sweep_line(result)
            lines.append((name, question, ratio, score, spread, difference, cache))
    return _table(lines, QUALITY_HEADERS, style)


def speed_table(lines: Sequence[SpeedLine], style: str = "simple") -> str:
    """A line for each cache that was decoded from, against the first one."""
    rows = [
        (
            NO_PRESS if line.press is None else _cut(brief(line.press, line.ratio)),
            f"{line.ratio:.3f}",
            _mib(line.cache_bytes),
            f"{1000 * line.seconds.median:.1f}",
            f"{1000 * line.seconds.low:.1f} to {1000 * line.seconds.high:.1f}",
            f"{lines[0].seconds.median / line.seconds.median:.2f}",
        )
        for line in lines
    ]
    return _table(rows, SPEED_HEADERS, style)


def ranking_table(results: Sequence[Result], style: str = "simple") -> str | None:
    """A line for each press that was scored at every ratio, the best one first.

    Presses are compared at equal bytes: what counts at a ratio is the score of the run with the
    most bytes that keeps no more than the ratio leaves of what no press allocates. Those that never
    keep so little come last.

    Args:
        results: of one group.
        style: a format of tabulate.

    Returns:
        None if nothing was scored, or at fewer than two ratios.
    """
    rated = [r for r in results if r.run.config.compression_ratio is not None]
    ratios = sorted({result.run.config.ratio for result in rated})
    presses: dict[str, list[Result]] = {}
    for result in sorted(rated, key=lambda result: result.run.config.ratio):
        presses.setdefault(result.run.config.press_name, []).append(result)
    whole = {name: some for name, some in presses.items() if len(some) == len(ratios)}
    if len(ratios) < 2 or any(result.metrics["score"] is None for result in rated):
        return None
    base = next((r for r in results if r.run.press is None), None)
    fitting = {
        name: [_fitting(some, ratio, base) for ratio in ratios] for name, some in whole.items()
    }
    ranked = sorted(fitting.items(), key=lambda item: _place(item[1]))
    headers = ("press", *(f"at {ratio}" for ratio in ratios), *RANKING_MEANS)
    return _table([_ranking_line(name, some) for name, some in ranked], headers, style)


def sweep_text(results: Sequence[Sequence[Result]]) -> str:
    """The results of every group, with a heading each."""
    return "\n\n".join(f"{_heading(group)}\n\n{sweep_table(group)}" for group in results)


def sweep_page(results: Sequence[Sequence[Result]], command: str) -> str:
    """The results of every group as Markdown, with how to read them and what measured them."""
    top = f"# Results\n\nThis page is made by `{command}`.\n\n{HOW_TO_READ}"
    parts = [_section(group) for group in results]
    machines = sorted({result.metrics["machine"] for group in results for result in group})
    return "\n".join([top, *parts, *(f"Measured on: {machine}\n" for machine in machines)])


def sweep_sheet(results: Sequence[Sequence[Result]]) -> str:
    """A line for each result of every group, for spreadsheets: numbers in full."""
    return spreadsheet([_sheet_row(result) for group in results for result in group])


def _sheet_row(result: Result) -> dict[str, SheetCell]:
    config, metrics, compared = result.run.config, result.metrics, result.paired
    difference = None if compared is None else asdict(compared.difference)
    sizes = metrics["score"] or metrics["kl"] or metrics["perplexity"] or {}
    return {
        "model": config.model,
        "dataset": config.dataset,
        "part": config.data_dir,
        "press sees": "question" if config.query_aware else "context",
        "press": config.press_name,
        "nominal ratio": config.compression_ratio,
        "ratio": metrics["compression_ratio"],
        **estimated("score", metrics["score"]),
        **estimated("difference to no press", difference),
        "flips": None if compared is None else compared.flips,
        **estimated("KL", metrics["kl"]),
        **estimated("perplexity", metrics["perplexity"]),
        "bytes before": metrics["cache_bytes_before"],
        "bytes after": metrics["cache_bytes_after"],
        "prefill s": metrics["prefill_seconds"],
        "press s": metrics["press_seconds"],
        "tokens/s": metrics["decode_tokens_per_second"],
        "samples": sizes.get("samples"),
        "contexts": sizes.get("contexts"),
        "notes": "; ".join(notes_of(config, metrics)),
        "machine": metrics["machine"],
    }


def _table(lines: Sequence[Sequence[str]], headers: Sequence[str], style: str) -> str:
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(lines, headers, tablefmt=style, colalign=align, disable_numparse=True)


def _section(group: Sequence[Result]) -> str:
    """A group's ranking, if it has one, and everything that was measured."""
    heading, table = f"## {_heading(group)}\n", f"{sweep_table(group, 'github')}\n"
    ranking = ranking_table(group, "github")
    if ranking is None:
        return f"{heading}\n{table}"
    top = (
        "Score with at most the bytes that a ratio leaves of those without a press (and 15 %, for "
        "pages that are not full), with its 95 % interval; the best mean first. What a ratio frees "
        "depends on the press: one that frees less shows what it scored at a higher ratio, or "
        "nothing where it never kept so little, and stands below."
    )
    return f"{heading}\n{top}\n\n{ranking}\n\nEverything that was measured:\n\n{table}"


def _fitting(results: Sequence[Result], ratio: float, base: Result | None) -> Result | None:
    """The run with the most bytes that keeps no more than a ratio leaves; None if none does."""

    def kept(result: Result) -> float:
        whole = (result if base is None else base).metrics
        before = whole["cache_bytes_before"] if base is None else whole["cache_bytes_after"]
        return result.metrics["cache_bytes_after"] / before

    small = [result for result in results if kept(result) <= (1 - ratio) * EQUAL]
    return max(small, key=kept, default=None)


def _place(results: Sequence[Result | None]) -> tuple[int, float, float]:
    """Where a press stands in a ranking: by what it lacks, its mean score, its divergence."""
    found = [result for result in results if result is not None]
    if not found:
        return len(results), 0.0, 0.0
    kl = _mean_kl(found)
    # One that was not measured comes last of equals: NaN would leave their order to chance.
    return len(results) - len(found), -_mean_score(found), math.inf if math.isnan(kl) else kl


def _ranking_line(name: str, results: Sequence[Result | None]) -> list[str]:
    scores = ["" if r is None else " (".join(_scored(r.metrics)) + ")" for r in results]
    found = [result for result in results if result is not None]
    if not found:
        return [_cut(name), *scores, "", "", ""]
    kl, score = _mean_kl(found), f"{_mean_score(found):.3f}"
    return [_cut(name), *scores, score, "" if math.isnan(kl) else f"{kl:.4f}", _mean_kept(found)]


def _mean_score(results: Sequence[Result]) -> float:
    return fmean(result.metrics["score"]["mean"] for result in results)


def _mean_kl(results: Sequence[Result]) -> float:
    """Mean divergence over ratios; NaN where it was not measured."""
    kls = [result.metrics["kl"] for result in results]
    return math.nan if None in kls else fmean(kl["mean"] for kl in kls)


def _mean_kept(results: Sequence[Result]) -> str:
    """Mean share of the bytes that are kept."""
    every = [result.metrics for result in results]
    return f"{fmean(m['cache_bytes_after'] / m['cache_bytes_before'] for m in every):.2f}"


def notes_of(config: EvaluationConfig, metrics: Mapping) -> list[str]:
    """What is out of the ordinary in how samples were asked."""
    chat = {None: "", True: "all in the chat template", False: "no chat template"}[config.chat]
    label = config.prompts_label
    prompts = "" if label is None else f"prompts of {shortened(label)}"
    return [note for note in (prompts, chat, cut_text(metrics)) if note]


def _heading(group: Sequence[Result]) -> str:
    config, score = group[0].run.config, group[0].metrics["score"]
    part = f" {config.data_dir}" if config.data_dir else ""
    aware = "query-aware" if config.query_aware else "query-agnostic"
    counts = "" if score is None else f", {score['contexts']} contexts, {score['samples']} samples"
    notes = "".join(f", {note}" for note in notes_of(config, group[0].metrics))
    return f"{config.model} on {config.dataset}{part}, {aware}{counts}{notes}"


def _sweep_line(result: Result) -> list[str]:
    metrics, compared = result.metrics, result.paired
    difference = flips = ""
    if compared is not None:
        low, high = compared.difference.low, compared.difference.high
        difference = f"{compared.difference.mean:+.3f} ({low:+.2f} to {high:+.2f})"
        flips = f"{compared.flips:.2f}"
    name, ratio, score, spread, _, after, prefill, speed = _line(
        result.run.config.press_name, metrics
    )
    kl = "" if metrics["kl"] is None else f"{metrics['kl']['mean']:.4f}"
    added = metrics["press_seconds"]
    added = "" if added is None else f"{added:.2f}"
    return [name, ratio, score, spread, difference, flips, kl, after, prefill, added, speed]


def _line(name: str, metrics: Mapping) -> list[str]:
    return [
        _cut(name),
        f"{metrics['compression_ratio']:.3f}",
        *_scored(metrics),
        _mib(metrics["cache_bytes_before"]),
        _mib(metrics["cache_bytes_after"]),
        f"{metrics['prefill_seconds']:.2f}",
        f"{speed:.1f}" if (speed := metrics["decode_tokens_per_second"]) else "",
    ]


def _cut(name: str) -> str:
    """A name that does not make every line of a table as long as itself."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def _scored(metrics: Mapping) -> tuple[str, str]:
    """Score and interval; where only a perplexity was measured, that."""
    score = metrics["score"]
    if score is not None:
        return f"{score['mean']:.3f}", _interval(score)
    perplexity = metrics["perplexity"]
    if perplexity is None:
        return "", ""
    return f"ppl {perplexity['mean']:.2f}", _spread(perplexity)


def _spread(estimate: Mapping) -> str:
    """The interval, if one is known."""
    return "" if None in (estimate["low"], estimate["high"]) else _interval(estimate)


def _interval(score: Mapping) -> str:
    return f"{score['low']:.2f} to {score['high']:.2f}"


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
