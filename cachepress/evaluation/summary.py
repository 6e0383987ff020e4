"""Tables of results that commands print, and the Markdown page of a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.prompts import shortened
from cachepress.evaluation.ranking import Ranked, ranked
from cachepress.evaluation.results import Metrics, Scores
from cachepress.evaluation.runner import Result
from cachepress.evaluation.speed import SpeedLine
from cachepress.evaluation.statistics import Estimate, Paired
from cachepress.evaluation.tables import (
    ESTIMATE,
    Column,
    interval_text,
    sheet_line,
    spreadsheet,
    table,
)
from cachepress.spec import NO_PRESS, brief

LONGEST_NAME = 72
HOW_TO_READ = (
    "Ratio: share of key-value pairs evicted, measured. Score: mean, with a 95 % interval "
    "clustered by context. Difference: to no press on the same samples, with its interval. Flips: "
    "share of samples that are right in one and wrong in the other. KL: divergence from what the "
    "uncompressed model expects while it says its own answer, nats a token. Cache: bytes allocated "
    "for keys and values. Prefill: median seconds of reading a context; press: those that the "
    "press added. Tokens/s: of one sequence, after the context.\n"
)


@dataclass(frozen=True)
class Line:
    """Line of a table of results.

    Attributes:
        name: of the press, or of its folder.
        metrics: what was measured.
        paired: how it differs from no press; None if that is not known.
        question: where the question stood.
    """

    name: str
    metrics: Metrics
    paired: Paired | None = None
    question: str = ""


PRESS: Column[Line] = Column("press", lambda line: _cut(line.name))
RATIO: Column[Line] = Column("ratio", lambda line: line.metrics.compression_ratio, ".3f")
SCORE: Column[Line] = Column("score", lambda line: _scored(line.metrics)[0])
INTERVAL: Column[Line] = Column("95 % interval", lambda line: _scored(line.metrics)[1])
BEFORE: Column[Line] = Column("cache before", lambda line: _mib(line.metrics.cache_bytes_before))
AFTER: Column[Line] = Column("cache after", lambda line: _mib(line.metrics.cache_bytes_after))
PREFILL: Column[Line] = Column("prefill s", lambda line: line.metrics.prefill_seconds, ".2f")
SPEED: Column[Line] = Column("tokens/s", lambda line: line.metrics.speeds[0], ".1f")
DIFFERENCE: Column[Line] = Column("difference to no press", lambda line: _difference(line.paired))
FLIPS: Column[Line] = Column("flips", lambda line: line.paired and line.paired.flips, ".2f")
KL: Column[Line] = Column("KL", lambda line: line.metrics.kl and line.metrics.kl.mean, ".4f")
ADDED: Column[Line] = Column("press s", lambda line: line.metrics.press_seconds, ".2f")
QUESTION: Column[Line] = Column("question", lambda line: line.question)
DROPPED, CACHE = replace(RATIO, title="dropped"), replace(AFTER, title="cache")
RESULTS = (PRESS, RATIO, SCORE, INTERVAL, BEFORE, AFTER, PREFILL, SPEED)
SWEEP = (PRESS, RATIO, SCORE, INTERVAL, DIFFERENCE, FLIPS, KL, CACHE, PREFILL, ADDED, SPEED)
QUALITY = (PRESS, QUESTION, DROPPED, SCORE, INTERVAL, DIFFERENCE, CACHE)
TASKS: tuple[Column[tuple[str, Estimate]], ...] = (
    Column("task", lambda line: line[0]),
    Column("score", lambda line: line[1].mean, ".3f"),
    Column("95 % interval", lambda line: interval_text(line[1])),
    Column("samples", lambda line: line[1].samples),
    Column("contexts", lambda line: line[1].contexts),
)
DECODING: tuple[Column[SpeedLine], ...] = (
    Column("press", lambda x: NO_PRESS if x.press is None else _cut(brief(x.press, x.ratio))),
    Column("dropped", lambda line: line.ratio, ".3f"),
    Column("cache", lambda line: _mib(line.cache_bytes)),
    Column("ms a token", lambda line: 1000 * line.seconds.median, ".1f"),
    Column("middle half", lambda x: f"{1000 * x.seconds.low:.1f} to {1000 * x.seconds.high:.1f}"),
)
RANKED: Column[Ranked] = Column("press", lambda line: _cut(line.press))
MEANS: tuple[Column[Ranked], ...] = (
    Column("mean score", lambda line: line.score, ".3f"),
    Column("mean KL", lambda line: line.kl, ".4f"),
    Column("mean bytes kept", lambda line: line.kept, ".2f"),
)
SHEET: tuple[Column[Result], ...] = (
    Column("model", lambda result: result.run.config.model),
    Column("dataset", lambda result: result.run.config.dataset),
    Column("part", lambda result: result.run.config.data_dir),
    Column("press sees", lambda x: "question" if x.run.config.query_aware else "context"),
    Column("press", lambda result: result.run.config.press_name),
    Column("nominal ratio", lambda result: result.run.config.compression_ratio),
    Column("ratio", lambda result: result.metrics.compression_ratio),
    Column("score", lambda result: result.metrics.score, kind=ESTIMATE),
    Column("difference to no press", lambda x: x.paired and x.paired.difference, kind=ESTIMATE),
    Column("flips", lambda result: result.paired and result.paired.flips),
    Column("KL", lambda result: result.metrics.kl, kind=ESTIMATE),
    Column("perplexity", lambda result: result.metrics.perplexity, kind=ESTIMATE),
    Column("bytes before", lambda result: result.metrics.cache_bytes_before),
    Column("bytes after", lambda result: result.metrics.cache_bytes_after),
    Column("prefill s", lambda result: result.metrics.prefill_seconds),
    Column("press s", lambda result: result.metrics.press_seconds),
    Column("tokens/s", lambda result: result.metrics.decode_tokens_per_second),
    Column("samples", lambda result: result.metrics.samples),
    Column("contexts", lambda result: result.metrics.contexts),
    Column("notes", lambda result: "; ".join(notes_of(result.run.config, result.metrics))),
    Column("machine", lambda result: result.metrics.machine),
)


def results_table(lines: Sequence[tuple[str, Metrics]], style: str = "simple") -> str:
    """Format a table of results, one line each."""
    return table(RESULTS, [Line(name, metrics) for name, metrics in lines], style)


def task_table(scores: Scores, style: str = "simple") -> str:
    """Format a table of tasks: score, interval, number of samples, and other reported numbers."""
    lines = []
    for task, score in scores.tasks.items():
        reported = scores.reported.get(task, {})
        named = {task: score, **{f"{task}: {name}": found for name, found in reported.items()}}
        lines += [(name, found) for name, found in named.items() if found is not None]
    return table(TASKS, lines, style, align="left")


def cut_text(contexts: int | None, tokens: int | None) -> str:
    """Say how many contexts were cut, and by how many tokens; "" if none was."""
    if not contexts:
        return ""
    return f"{contexts} context{'s' * (contexts != 1)} cut, {tokens:,} tokens in all"


def sweep_table(results: Sequence[Result], style: str = "simple") -> str:
    """Format a table of a group's results, with their differences to no press."""
    return table(SWEEP, [_line(result) for result in results], style)


def quality_table(groups: Sequence[Sequence[Result]], style: str = "simple") -> str:
    """Format a table of the scores and bytes of all groups."""
    return table(QUALITY, [_line(result) for group in groups for result in group], style)


def speed_table(lines: Sequence[SpeedLine], style: str = "simple") -> str:
    """Format a table of decoding speeds, relative to the first cache."""
    first = lines[0].seconds.median
    times: Column[SpeedLine] = Column("times as fast", lambda x: first / x.seconds.median, ".2f")
    return table((*DECODING, times), lines, style)


def ranking_table(results: Sequence[Result], style: str = "simple") -> str | None:
    """Format the ranking of presses, the best one first; see ``ranked``.

    Returns:
        None if nothing was scored, or at fewer than two ratios.
    """
    ratios, lines = ranked(results)
    if not ratios:
        return None
    scores: list[Column[Ranked]] = [_at(place, ratio) for place, ratio in enumerate(ratios)]
    return table((RANKED, *scores, *MEANS), lines, style)


def _at(place: int, ratio: float) -> Column[Ranked]:
    """Make the column of the score at a ratio, with its interval."""

    def text(line: Ranked) -> str:
        result = line.results[place]
        return "" if result is None else " (".join(_scored(result.metrics)) + ")"

    return Column(f"at {ratio}", text)


def sweep_text(results: Sequence[Sequence[Result]]) -> str:
    """Format the tables of every group, with a heading each."""
    return "\n\n".join(f"{_heading(group)}\n\n{sweep_table(group)}" for group in results)


def sweep_page(results: Sequence[Sequence[Result]], command: str) -> str:
    """Format the results of every group as a Markdown page, with an explanation and the machine."""
    top = f"# Results\n\nThis page is made by `{command}`.\n\n{HOW_TO_READ}"
    parts = [_section(group) for group in results]
    machines = sorted({result.metrics.machine for group in results for result in group})
    return "\n".join([top, *parts, *(f"Measured on: {machine}\n" for machine in machines)])


def sweep_sheet(results: Sequence[Sequence[Result]]) -> str:
    """Format all results as CSV for spreadsheets, numbers in full."""
    return spreadsheet([sheet_line(SHEET, result) for group in results for result in group])


def _section(group: Sequence[Result]) -> str:
    """Format the section of a group: its ranking, if any, and all results."""
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


def notes_of(config: EvaluationConfig, metrics: Metrics) -> list[str]:
    """List unusual options of prompts, and contexts that were cut."""
    chat = {None: "", True: "all in the chat template", False: "no chat template"}[config.chat]
    label = config.prompts_label
    prompts = "" if label is None else f"prompts of {shortened(label)}"
    return [
        note for note in (prompts, chat, cut_text(metrics.cut_contexts, metrics.cut_tokens)) if note
    ]


def _heading(group: Sequence[Result]) -> str:
    config, score = group[0].run.config, group[0].metrics.score
    part = f" {config.data_dir}" if config.data_dir else ""
    aware = "query-aware" if config.query_aware else "query-agnostic"
    counts = "" if score is None else f", {score.contexts} contexts, {score.samples} samples"
    notes = "".join(f", {note}" for note in notes_of(config, group[0].metrics))
    return f"{config.model} on {config.dataset}{part}, {aware}{counts}{notes}"


def _line(result: Result) -> Line:
    config = result.run.config
    question = "in sight" if config.query_aware else "later"
    return Line(config.press_name, result.metrics, result.paired, question)


def _cut(name: str) -> str:
    """Shorten a long name for tables."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def _scored(metrics: Metrics) -> tuple[str, str]:
    """Format score and interval, or else the perplexity."""
    if metrics.score is not None:
        return f"{metrics.score.mean:.3f}", interval_text(metrics.score)
    if metrics.perplexity is None:
        return "", ""
    return f"ppl {metrics.perplexity.mean:.2f}", interval_text(metrics.perplexity)


def _difference(paired: Paired | None) -> str:
    if paired is None:
        return ""
    found = paired.difference
    return f"{found.mean:+.3f} ({found.low:+.2f} to {found.high:+.2f})"


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
