"""Writes the tables of ``docs/gpu.md`` from the JSON of a run."""

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.card.plan import SECTIONS
from benchmarks.card.records import LINE, NO_TIME, Record, Values
from benchmarks.card.wanted import wanted

MARK = "<!-- What follows is written by `make gpu`. -->\n"
COMMAND = "PYTHONPATH=. python benchmarks/gpu.py --minutes 6"
NONE_YET = """
## Figures

None were measured yet with this version: `make gpu` writes them here.
"""
FIGURES = """
## Figures

{card}, {date}: `{command}` ({seconds:.0f} s).
torch {torch}, transformers {transformers}, Triton {triton}, Python {python}, cachepress
{cachepress}.
The model has the shape of Llama-3.1-8B, {layers} layers, and random weights, in {dtype}.
A copy reads and writes {copy} on this card. The limit of a step is its bytes, the weights that are
read and the pairs that are held, over that bandwidth.
"""
TITLES = {
    "decode": "Decoded steps",
    "kernel": "Attention of one layer",
    "parity": "Parity with a CPU",
    "peaks": "Prefill",
    "room": "Long contexts and large batches",
    "transformers": "Against transformers' caches",
    "kvpress": "kvpress",
}
COLUMNS: dict[str, dict[str, str]] = {
    "decode": {
        "batch": "batch",
        "length": "tokens",
        "cache": "cache",
        "mode": "steps",
        "way": "in",
        "ms": "ms a step",
        "limit_ms": "limit",
        "of_limit": "x limit",
        "tokens_s": "tokens/s",
        "held_mib": "held MiB",
    },
    "kernel": {
        "batch": "batch",
        "length": "tokens",
        "ratio": "evicted",
        "even": "evenly",
        "storage": "stored",
        "graph_us": "us",
        "calls_us": "us, called",
        "of_copy": "of a copy",
        "sdpa_graph_us": "SDPA us",
        "sdpa_calls_us": "SDPA us, called",
        "sdpa_of_copy": "SDPA of a copy",
        "of_sdpa": "x SDPA",
    },
    "peaks": {
        "press": "press",
        "layers": "layers",
        "length": "tokens",
        "seconds": "s",
        "added": "+ s",
        "peak_mib": "peak MiB",
        "peak_added": "+ peak",
    },
    "transformers": {
        "cache": "cache",
        "mode": "steps",
        "length": "tokens",
        "ms": "ms a step",
        "limit_ms": "limit",
        "of_limit": "x limit",
    },
    "kvpress": {
        "press": "press",
        "length": "tokens",
        "seconds": "prefill s",
        "peak_mib": "peak MiB",
        "ms": "ms a step",
    },
}
COLUMNS["room"] = COLUMNS["decode"]
PERCENT = {"ratio", "of_copy", "sdpa_of_copy", "added", "peak_added"}


def page(text: str, record: Record | None) -> str:
    """Write the page's figures anew; what stands before the mark stays."""
    before = text.partition(MARK)[0].rstrip() + "\n\n" + MARK
    if record is None or not record.sections:
        return before + NONE_YET
    parts = [_head(record), _wanted(record), *(_section(record, name) for name in SECTIONS)]
    return before + "\n".join(part.rstrip() + "\n" for part in parts if part)


def _head(record: Record) -> str:
    known: Mapping[str, object] = record.machine
    copy = record.one("decode", "gb_s")
    found = {
        name: known.get(name, "?")
        for name in ("card", "torch", "transformers", "triton", "python", "cachepress")
    }
    return FIGURES.format(
        **found,
        date=record.date,
        command=record.command,
        seconds=record.seconds,
        layers=record.sizes["layers"],
        dtype="bfloat16" if "multiprocessors" in known else "float32",
        copy="not measured" if copy is None else f"{copy:,.0f} GB/s",
    )


def _wanted(record: Record) -> str:
    rows = []
    for one in wanted(record):
        value = "" if one.value is None else _number(one.value)
        bound = f"{'≥' if one.least else '≤'} {_number(one.bound)}"
        rows.append([one.what, value, bound, one.said])
    return "### What is wanted\n\n" + table(["figure", "measured", "wanted", "met"], rows)


def _section(record: Record, name: str) -> str:
    own = record.sections.get(name)
    title = f"### {TITLES[name]}\n\n"
    if own is None or own.state == "not reached":
        return f"{title}Not reached in this run."
    took = f"{own.seconds:.0f} s{', cut' if own.state != 'done' else ''}."
    if name == "parity":
        return f"{title}{took}\n\n{_parity(own.cells)}"
    cells = _with_shares(own.cells) if name == "peaks" else own.cells
    names = COLUMNS[name]
    found = [x for x in cells.values() if LINE not in x and names.keys() & x.keys()]
    shown = [key for key in names if any(key in x for x in found)]
    rows = [[_text(key, x.get(key)) for key in shown] for x in found]
    tables = table([names[key] for key in shown], rows) if rows else ""
    return f"{title}{took}\n\n{tables}\n{_lines(cells)}"


def _with_shares(cells: Mapping[str, Values]) -> Mapping[str, Values]:
    """Add what a press adds to the prefill of the same layers and tokens without one."""
    bases = {(x["layers"], x["length"]): x for x in cells.values() if x.get("press") in BASES}
    found = {}
    for name, own in cells.items():
        base = bases.get((own.get("layers"), own.get("length")))
        if LINE in own or base is None or base is own:
            found[name] = own
            continue
        shares = {"added": own["seconds"] / base["seconds"] - 1}  # type: ignore
        if base["peak_mib"]:
            shares["peak_added"] = own["peak_mib"] / base["peak_mib"] - 1  # type: ignore
        found[name] = {**own, **shares}
    return found


BASES = ("none", "DynamicCache")


def _parity(cells: Mapping[str, Values]) -> str:
    """Count what is equal, and name what is not."""
    parts = []
    for kind, words in (
        ("steps", "architectures decode recorded as they do eagerly"),
        ("ways", "ways of use give on the device what they give on a CPU"),
        ("presses", "presses, wrapped presses, storages and chunks keep what they keep on a CPU"),
    ):
        own = {name: x for name, x in cells.items() if x.get("kind") == kind}
        equal = [name for name, x in own.items() if x["equal"]]
        parts.append(f"- {len(equal)} of {len(own)} {words}")
        parts += [f"    - not {name}" for name in own if name not in equal]
    steps = [x for x in cells.values() if x.get("kind") == "steps"]
    if steps:
        parts.append(f"- {sum(bool(x['replayed']) for x in steps)} of {len(steps)} were replayed")
    return "\n".join(parts) + "\n\n" + _lines(cells)


def _lines(cells: Mapping[str, Values]) -> str:
    """List the cells that have no figures, with why; those without time in one line."""
    found = [f"- {name}: {escaped(x[LINE])}" for name, x in cells.items() if _said(x)]
    late = [name for name, x in cells.items() if x.get(LINE) == NO_TIME]
    if late:
        found.append(f"- no time was left for {len(late)}: {'; '.join(late)}")
    return "\n".join(found)


def _said(values: Values) -> bool:
    return LINE in values and values[LINE] != NO_TIME


def _text(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and key in PERCENT:
        return f"{100 * value:.1f} %"
    return "" if value is None else _number(value)


def _number(value: object) -> str:
    """Write a number with three digits that count, or what is no float as it is."""
    if not isinstance(value, float):
        return str(value)
    if value and abs(value) < 100:
        return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"
    return f"{value:,.0f}"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [list(headers), ["---"] * len(headers), *(list(map(escaped, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def escaped(text: object) -> str:
    """Write text so that it is none of Markdown's own signs."""
    return str(text).replace("|", "\\|").replace("<", "&lt;")
