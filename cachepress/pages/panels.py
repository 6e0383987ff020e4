"""Groups runs that can be compared into panels, with Pareto fronts of quality and cost."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cachepress.evaluation.results import Metrics
from cachepress.evaluation.statistics import Estimate, Paired, finite, paired
from cachepress.evaluation.summary import cut_text
from cachepress.pages.saved import SavedRun
from cachepress.spec import NO_PRESS

DIGESTS = "digests"
"""The setting that says what a run was answered by, part by part."""
PLACES = ("device", "data_path", "output_dir", "log_level", "overwrite")
"""Settings that change no answer."""
OF_PRESS = ("press", "press_name", "compression_ratio")
OF_MODEL = ("weights", "tokenizer")
"""Digests of what answered; those of artefacts are a press's own."""
OF_STORAGE = ("storage", "prefill_mode", "prefill_chunk_size")
"""Settings that a run without a press cannot have, so that it is compared with across them."""
PROMPTING = ("chat", "prompts")
"""Settings that stand in a result only where they are not the data's own."""
TITLE = ("model", "dataset", "data_dir", "query_aware")
QUALITIES = {"score": "score", "kl": "KL divergence", "perplexity": "perplexity"}
"""What a quality is called; of all but the score, less is better."""
COSTS = {"kept": "kept bytes", "speed": "tokens per second"}


@dataclass(frozen=True, eq=False)
class Entry:
    """Run in a panel, compared with the run without a press.

    Attributes:
        run: the run.
        name: the press; for a guest, also how its settings differ.
        label: the same with the ratio.
        base: the run without a press on the same samples; None if there is none.
        guest: whether it is of another panel, and here to compare with.
        kept: bytes after compression, as a share of those without a press.
        versus: how it differs from ``base``; None if they share no scored sample.
        same: share of samples with the very same answer as ``base``; None if they share none.
        fronts: whether it is on the Pareto front, by quality and cost.
        leads: whether none is better in both by their means, whatever the intervals, the same way.
    """

    run: SavedRun
    name: str
    label: str
    base: SavedRun | None
    guest: bool
    kept: float
    versus: Paired | None
    same: float | None
    fronts: Mapping[tuple[str, str], bool]
    leads: Mapping[tuple[str, str], bool]

    @property
    def metrics(self) -> Metrics:
        """What was measured of the run."""
        return self.run.metrics

    @property
    def difference(self) -> Estimate | None:
        """The difference of scores to ``base``."""
        return None if self.versus is None else self.versus.difference


@dataclass(frozen=True, eq=False)
class Panel:
    """Panel of a report: runs that differ in their press only.

    Attributes:
        title: model and data.
        notes: what sets it apart from the other panels; whether presses saw the question.
        shared: settings that all runs have in common.
        entries: the runs, by press and ratio, no press first.
    """

    title: str
    notes: list[str]
    shared: Mapping[str, str]
    entries: list[Entry]

    @property
    def presses(self) -> list[str]:
        """Names of the presses, in the order of the entries."""
        return list(dict.fromkeys(entry.run.press for entry in self.entries))


def make_panels(runs: Sequence[SavedRun]) -> list[Panel]:
    """Group runs by everything but their press, and compare each with the run without a press."""
    groups: dict[tuple[str, ...], list[SavedRun]] = {}
    names = sorted({name for run in runs for name in _settings(run)})
    for run in runs:
        settings = _settings(run)
        key = tuple(settings.get(name, "") for name in (*TITLE, *names))
        groups.setdefault(key, []).append(run)
    bases = {_reading(run): run for run in runs if run.press == NO_PRESS}
    varying = _varying([_settings(run) for run in runs])
    return [_panel(groups[key], bases, varying) for key in sorted(groups)]


def shown(value: object) -> str:
    """Format a setting as text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "default"}[value]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def settings_of(run: SavedRun) -> dict[str, str]:
    """Return every setting, version and digest of a run, and the machine, as texts."""
    told = {name: shown(value) for name, value in run.config.items() if name != DIGESTS}
    digests = {f"{name} digest": shown(value) for name, value in _digests(run).items()}
    return {**told, **digests, "machine": run.metrics.machine}


def _settings(run: SavedRun) -> dict[str, str]:
    """Return the settings by which runs are grouped into panels."""
    left_out = (*PLACES, *OF_PRESS, "versions", "schema", DIGESTS)
    settings = {
        name: shown(value)
        for name, value in run.config.items()
        if name not in left_out and not name.endswith("_version")
    }
    digests = {f"{name} digest": shown(_digests(run).get(name, "unknown")) for name in OF_MODEL}
    return {**settings, **digests, "query_aware": shown(run.metrics.query_aware)}


def _digests(run: SavedRun) -> Mapping[str, object]:
    told = run.config.get(DIGESTS)
    return told if isinstance(told, Mapping) else {}


def _reading(run: SavedRun) -> str:
    """Return the settings, as a key, that a run shares with the run without a press.

    A press that looks at the question where it stands reads the very prompt that is read without
    it, so this goes by the setting.
    """
    settings = {**_settings(run), "query_aware": shown(run.config.get("query_aware", False))}
    return json.dumps({k: v for k, v in settings.items() if k not in OF_STORAGE}, sort_keys=True)


def _varying(settings: Sequence[Mapping[str, str]]) -> list[str]:
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if len({one.get(name) for one in settings}) > 1]


def _panel(runs: list[SavedRun], bases: Mapping[str, SavedRun], varying: list[str]) -> Panel:
    first = _settings(runs[0])
    aware = "query-aware: the press sees the question"
    agnostic = "query-agnostic: the press does not see the question"
    notes = [aware if runs[0].metrics.query_aware else agnostic]
    notes += [f"{name}: {first.get(name, 'default')}" for name in varying if name not in TITLE]
    notes += _asked(runs, [name for name in varying if name not in TITLE])
    entries = _entries(runs, bases)
    if any(entry.base is None and entry.run.press != NO_PRESS for entry in entries):
        notes.append("no run without a press to compare with: kept bytes are of a run's own")
    settings = [settings_of(entry.run) for entry in entries]
    shared = {k: v for k, v in settings[0].items() if all(one.get(k) == v for one in settings)}
    data = [first.get(name, "default") for name in ("dataset", "data_dir")]
    title = " ".join(_place(text) for text in data if text != "default")
    return Panel(f"{_place(first.get('model', ''))} on {title}", notes, shared, entries)


def _asked(runs: Sequence[SavedRun], said: Sequence[str]) -> list[str]:
    """List unusual options of prompts that the title does not say."""
    first = _settings(runs[0])
    notes = [f"{name}: {first[name]}" for name in PROMPTING if name in first and name not in said]
    contexts = max(run.metrics.cut_contexts or 0 for run in runs)
    tokens = max(run.metrics.cut_tokens or 0 for run in runs)
    return [*notes, cut_text(contexts, tokens)] if contexts else notes


def _place(text: str) -> str:
    """Remove the folders from a path."""
    return Path(text).name if Path(text).is_absolute() else text


def _entries(runs: list[SavedRun], bases: Mapping[str, SavedRun]) -> list[Entry]:
    own = {run.folder for run in runs}
    base_of = {run.folder: bases.get(_reading(run)) for run in runs}
    guests = {base.folder: base for base in base_of.values() if base and base.folder not in own}
    together = [*guests.values(), *runs]
    together.sort(key=lambda run: (run.press != NO_PRESS, run.press, run.ratio, run.folder))
    kept = {run.folder: _kept(run, base_of.get(run.folder, run)) for run in together}
    keys = [(quality, cost) for quality in QUALITIES for cost in COSTS]
    leads = {key: _leading(_points(together, kept, *key)) for key in keys}
    fronts = {key: _front(points) for key, points in leads.items()}
    notes = {name: _difference(guest, runs[0]) for name, guest in guests.items()}
    return [
        _entry(run, base_of.get(run.folder), notes.get(run.folder), kept[run.folder], fronts, leads)
        for run in together
    ]


def _entry(
    run: SavedRun,
    base: SavedRun | None,
    note: str | None,
    kept: float,
    fronts: Mapping[tuple[str, str], Sequence["_Point"]],
    leads: Mapping[tuple[str, str], Sequence["_Point"]],
) -> Entry:
    name = run.press if note is None else f"{run.press} ({note})"
    other = None if base is run else base
    return Entry(
        run=run,
        name=name,
        label=name if run.press == NO_PRESS else f"{name} {run.ratio:g}",
        base=other,
        guest=note is not None,
        kept=kept,
        versus=None if other is None else _versus(run, other),
        same=None if other is None else _same(run.predictions, other.predictions),
        fronts=_membership(run, fronts),
        leads=_membership(run, leads),
    )


def _difference(guest: SavedRun, own: SavedRun) -> str:
    """Describe how the settings of a run from another panel differ from those of this one."""
    mine, theirs = _settings(own), _settings(guest)
    names = [n for n in theirs if n != "query_aware" and theirs[n] != mine.get(n)]
    notes = [f"{n} {theirs[n]}" for n in names]
    if guest.metrics.query_aware != own.metrics.query_aware:
        notes.insert(0, "query-aware" if guest.metrics.query_aware else "query-agnostic")
    return ", ".join(notes)


def _kept(run: SavedRun, base: SavedRun | None) -> float:
    """Compute the share of bytes kept, relative to the run without a press if there is one."""
    whole = (run if base is None else base).metrics.cache_bytes_before
    return run.metrics.cache_bytes_after / whole if whole else math.nan


def _versus(run: SavedRun, base: SavedRun) -> Paired | None:
    scored, other = (one.predictions.dropna(subset=["score"]) for one in (run, base))
    return paired(scored, other) if len(scored.index.intersection(other.index)) else None


def _same(run: pd.DataFrame, base: pd.DataFrame) -> float | None:
    both = run.index.intersection(base.index)
    if not len(both):
        return None
    answers = [table.loc[both, "predicted_answer"] for table in (run, base)]
    return float((answers[0] == answers[1]).mean())


def quality_of(run: SavedRun, quality: str) -> Estimate | None:
    """Look up the score, the divergence or the perplexity of a run."""
    metrics = run.metrics
    return {"score": metrics.score, "kl": metrics.kl, "perplexity": metrics.perplexity}[quality]


def _membership(
    run: SavedRun, members: Mapping[tuple[str, str], Sequence["_Point"]]
) -> dict[tuple[str, str], bool]:
    """Tell whether a run is among the members, for each quality and cost."""
    return {key: run.folder in {p.folder for p in points} for key, points in members.items()}


@dataclass(frozen=True)
class _Point:
    """Run as a point of a Pareto front: quality and cost with their bounds, more being better.

    Attributes:
        quality: mean, low and high.
        thrift: the same of its cost, negated where less is better.
    """

    folder: str
    quality: tuple[float, float, float]
    thrift: tuple[float, float, float]


def _points(
    runs: Sequence[SavedRun], kept: Mapping[str, float], quality: str, cost: str
) -> list[_Point]:
    """Make the points of the runs that have both, the cheapest first."""
    points = []
    for run in runs:
        estimate = quality_of(run, quality)
        if estimate is None:
            continue
        good = _ends(estimate.mean, estimate.low, estimate.high, quality != "score")
        thrift = _ends(kept[run.folder], kept[run.folder], kept[run.folder], True)
        if cost == "speed":
            thrift = _ends(*run.metrics.speeds, False)
        if math.isfinite(good[0]) and math.isfinite(thrift[0]):
            points.append(_Point(run.folder, good, thrift))
    return sorted(points, key=lambda point: (-point.thrift[0], -point.quality[0]))


def _ends(
    mean: float | None, low: float | None, high: float | None, less_is_better: bool
) -> tuple[float, float, float]:
    """Return mean, low and high so that more is better; unknown bounds are infinite."""
    if mean is None:
        return (math.nan, math.nan, math.nan)
    low = -math.inf if finite(low) is None else low
    high = math.inf if finite(high) is None else high
    assert low is not None and high is not None
    return (-mean, -high, -low) if less_is_better else (mean, low, high)


def _leading(points: Sequence[_Point]) -> list[_Point]:
    """Find the points that no other one beats in the means of quality and cost."""
    means = [(point.quality[0], point.thrift[0]) for point in points]
    return [
        point
        for point, (good, thrift) in zip(points, means, strict=True)
        if not any(g >= good and t >= thrift and (g, t) != (good, thrift) for g, t in means)
    ]


def _front(leading: Sequence[_Point]) -> list[_Point]:
    """Find the leading points whose intervals do not overlap, the cheapest first.

    Going from the thriftiest to the best, a point is taken if its quality is above that of the one
    taken before it, with intervals that do not overlap. Where their costs overlap, the better one
    alone stays. A single point is no front.
    """
    taken: list[_Point] = []
    for point in leading:
        if taken and point.quality[1] <= taken[-1].quality[2]:
            continue
        while taken and point.thrift[2] >= taken[-1].thrift[1]:
            taken.pop()
        taken.append(point)
    return taken if len(taken) > 1 else []
