"""Generates the page of all presses, from their classes and a benchmark."""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten

from tabulate import tabulate

from cachepress.bench import MIB, BenchOptions, BenchResult, run_bench
from cachepress.budgets import Threshold
from cachepress.errors import CachepressError
from cachepress.evaluation.typed import read_as
from cachepress.presses import BasePress, ScorerPress, SnapKVPress
from cachepress.spec import NO_PRESS, aliases, parse
from cachepress.view import EVERY

_RATIOS = [0.4, 0.6] * 15
EXAMPLES: dict[str, str] = {
    "block": "BlockPress(KeyDiffPress({ratio}))",
    "cam": "CAMPress(SnapKVPress(), target_size=1024)",
    "composed": "ComposedPress([SnapKVPress(0.3), KnormPress(0.3)])",
    "decoding": "DecodingPress(SnapKVPress(), target_size=1024)",
    "dms": "DMSPress(KnormPress(), -17)",
    "per_layer": f"PerLayerCompressionPress(SnapKVPress(), {_RATIOS})",
    "prefill_decoding": "PrefillDecodingPress(SnapKVPress({ratio}), DecodingPress(KnormPress()))",
    "simlayerkv": "SimLayerKVPress(0.9, n_recent=1024)",
}
"""Spellings for classes that need more than a ratio or an inner press to stand for them.

Numbers of pairs are half of the 2,048 tokens that are measured.
"""
RECOMMENDED: dict[str, str] = {
    "compactor": "AdaKVPress(CompactorPress({ratio}))",
    "critical": "CriticalKVPress(AdaKVPress(ExpectedAttentionPress({ratio}, use_vnorm=False)))",
    "defensivekv": "AdaKVPress(DefensiveKVPress({ratio}), scope='model')",
    "expected_attention": "AdaKVPress(ExpectedAttentionPress({ratio}, epsilon=0.01))",
    "expected_attention_stats": "AdaKVPress(ExpectedAttentionStatsPress({ratio}, epsilon=0.01))",
    "kvzap": "AdaKVPress(KVzapPress({ratio}))",
    "lukv": "LUKVPress(ExpectedAttentionPress({ratio}, epsilon=0.02))",
}
"""The form in which authors recommend a method, where that is not the class by itself.

Mostly heads of a layer, or of the model, compete for its scores.
"""
COLUMNS = ("press", "what it does", "paper", "looks at", "frees", "best for")
MEASURED = ("press", "spelling", "prefill +%", "bytes", "step")


@dataclass(frozen=True)
class Measured(BenchResult):
    """Benchmark of one press of each class, with the reasons why other classes are not in it.

    Attributes:
        aliases: of the presses that were measured, after no press.
        left_out: why others were not.
    """

    aliases: list[str]
    left_out: Mapping[str, str]


def example(kind: type[BasePress], ratio: float) -> BasePress:
    """Make a press of a class with the fewest options, at a ratio where it has one."""
    text = EXAMPLES.get(str(kind.alias))
    if text is not None:
        press = parse(text.format(ratio=ratio))
        assert press is not None
        return press
    if issubclass(kind, ScorerPress):
        return kind(ratio)
    press = kind(**dict.fromkeys(_needed(kind), SnapKVPress(ratio)))
    try:
        return press.with_ratio(ratio)
    except CachepressError:
        return press


def _needed(kind: type) -> list[str]:
    """List the options of a class that have no default."""
    return [f.name for f in fields(kind) if f.default is MISSING]


def recommended(kind: type[BasePress], ratio: float) -> BasePress:
    """Make a press of a class in the form in which its authors recommend it."""
    text = RECOMMENDED.get(str(kind.alias))
    press = example(kind, ratio) if text is None else parse(text.format(ratio=ratio))
    assert press is not None
    return press


def own_presses() -> dict[str, type[BasePress]]:
    """List the press classes of this package by alias, without those that users registered."""
    return {k: v for k, v in aliases().items() if v.__module__.startswith("cachepress.")}


def facts(kind: type[BasePress]) -> tuple[str, ...]:
    """Describe a press class in a line of the page, read off its docstring and its ``Needs``."""
    press, text = example(kind, 0.5), inspect.getdoc(kind) or ""
    first, _, rest = text.partition("\n\n")
    body = " ".join(rest.partition("Attributes:\n")[0].split())
    best = re.search(r"Best for (.*?)\.(?: |$)", body)
    papers = re.findall(r"arXiv:(\d{4}\.\d{5})", body)
    return (
        f"`{kind.alias}` {kind.__name__}",
        " ".join(first.split()).rstrip(".").replace("``", "`"),
        ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers),
        _looks_at(press),
        _frees(press),
        best[1].replace("``", "`") if best else "",
    )


def grows(kind: type[BasePress]) -> str | None:
    """Say what a press's time grows with, where it grows faster than n log n in the prompt."""
    words = " ".join((inspect.getdoc(kind) or "").split())
    said = re.search(r"[Tt]ime that grows with ([^.;]*)", words)
    if said is not None:
        return said[1]
    needs = example(kind, 0.5).needs
    if needs.attention_sums:
        return "the square of the prompt, as attention itself does"
    return None


def page(measured: Mapping[str, object] | None) -> str:
    """Write the page as Markdown.

    Args:
        measured: what ``measure`` gave; None to leave the measurement out.
    """
    parts = [
        "# The presses\n",
        "This page is made by `make presses`, from the classes and from a measurement.\n",
        tabulate([facts(kind) for kind in own_presses().values()], COLUMNS, tablefmt="github"),
        "\nWhat a press adds to the model's own forwards takes time that grows with the text, as "
        "sorting does at most, but for:\n",
        *(f"- `{alias}`: {more}" for alias, kind in own_presses().items() if (more := grows(kind))),
        "\nAs their authors recommend them, and as the leaderboard measures them:\n",
        *(f"- `{alias}`: `{text.format(ratio=0.5)}`" for alias, text in RECOMMENDED.items()),
    ]
    if measured is not None:
        parts.append(_measured_part(read_as(Measured, measured)))
    return "\n".join(parts) + "\n"


def measure(options: BenchOptions, ratio: float) -> dict[str, object]:
    """Time every press at a ratio, interleaved in one run.

    Presses that do not fit the model, or that have to be trained for it first, are left out, and
    the reason is kept.
    """
    from cachepress.models.loading import load

    model, _ = load(options.model, dtype=options.dtype, device=options.device)
    spellings, left_out = {}, {}
    for alias, kind in own_presses().items():
        try:
            press = example(kind, ratio)
            press.for_model(model)
        except CachepressError as error:
            left_out[alias] = str(error)
        else:
            spellings[alias] = repr(press)
    result = run_bench(replace(options, presses=list(spellings.values())))
    return asdict(Measured(**vars(result), aliases=list(spellings), left_out=left_out))


def write_page(path: str, measured: Mapping[str, object] | None) -> None:
    """Write the page, and beside it what it was made from."""
    target = Path(path)
    with TemporaryDirectory(dir=target.parent) as folder:
        draft = Path(folder) / target.name
        draft.write_text(page(measured), encoding="utf-8")
        if measured is not None:
            data = Path(folder) / "data.json"
            data.write_text(json.dumps(measured) + "\n", encoding="utf-8")
            data.replace(target.with_suffix(".json"))
        draft.replace(target)


def _measured_part(found: Measured) -> str:
    base = next(one for one in found.cells if one.press == NO_PRESS)
    lines = [
        (
            f"`{alias}`",
            f"`{_short(alias)}`",
            f"{100 * one.share:.1f}",
            f"{one.held / base.held:.2f}",
            f"{one.step / base.step:.2f}",
        )
        for alias, one in zip(found.aliases, found.cells[1:], strict=True)
    ]
    parts = [
        "\n## Measured\n",
        f"{found.machine}; {base.length} tokens of English, "
        f"{found.options['steps']} decoded tokens in turns with the others, "
        f"{found.options['repeats']} repeats, medians. Prefill: what the press adds to the "
        "forward. Bytes and the time of a decoded token: of those without a press, which hold "
        f"{base.held / MIB:.0f} MiB and take {1000 * base.step:.0f} ms.\n",
        tabulate(lines, MEASURED, tablefmt="github", disable_numparse=True),
    ]
    later = [alias for alias in own_presses() if alias not in (*found.aliases, *found.left_out)]
    left_out = {**found.left_out, **dict.fromkeys(later, "not measured yet")}
    if left_out:
        parts.append("\nNot measured:\n")
        parts += [f"- `{alias}`: {reason}" for alias, reason in left_out.items()]
    return "\n".join(parts)


def _short(alias: str) -> str:
    """The spelling that was measured, without defaults."""
    kind, text = own_presses()[alias], EXAMPLES.get(alias)
    if text is not None:
        return shorten(text.format(ratio=0.5), 75)
    inner = getattr(example(kind, 0.5), "press", None)
    return f"{kind.__name__}({'0.5' if inner is None else f'{type(inner).__name__}(0.5)'})"


def _looks_at(press: BasePress) -> str:
    """Describe in words what a press observes."""
    needs, found = press.needs, []
    if needs.question:
        found.append("the question's queries")
    if needs.queries:
        found.append(_queries(needs.queries))
    words = {
        "attention_sums": "attention sums",
        "rotary": "the rotary embedding",
        "projection": "the output projection",
        "hidden": "hidden states",
    }
    found += [text for name, text in words.items() if getattr(needs, name)]
    if needs.moments_after is not None:
        found.append("moments of the queries")
    if press.needs.reconstruction is not None:
        gradient = " with gradients" if press.needs.reconstruction.gradient else ""
        found.append(f"a reconstruction of the context{gradient}")
    return ", ".join(found) or "keys and values only"


def _queries(n: int) -> str:
    if n == 1:
        return "the last query"
    return "all queries" if n == EVERY else f"the last {n} queries"


def _frees(press: BasePress) -> str:
    """Describe in words what a press makes smaller."""
    if press.needs.storage is not None:
        return f"pairs, and bits: {press.needs.storage.bits} a number"
    if press.needs.pages_read(2) is not None:
        return "nothing; fewer pairs are read"
    if isinstance(press.budget, Threshold):
        return "pairs, as many as its rule says"
    own = {"head": "pairs, as many in each head", "layer": "pairs, each head its own number"}
    text = own.get(press.budget.scope, "pairs, each head of each layer its own number")
    if type(press).key_channels is not BasePress.key_channels and press.needs.rewrites:
        return "channels of the keys"
    return text
