"""Runs the commands behind docs/benchmarks.md, and writes it.

python evaluation/benchmarks.py             # everything, an hour or so
python evaluation/benchmarks.py decode      # one section; the others stay as they were
python evaluation/benchmarks.py --page      # nothing is run, the page is written again
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from tabulate import tabulate

from cachepress.evaluation.records import write_atomically

ROOT = Path(__file__).parents[1]
PAGE, DATA = (ROOT / name for name in ("docs/benchmarks.md", "docs/benchmarks.json"))
Found = dict[str, object]

DECODE = ["KnormPress(0.0)", "SnapKVPress(0.5)", "AdaKVPress(SnapKVPress(0.9))"]
SIX = ["knorm", "snapkv", "keydiff", "tova", "expected_attention", "streaming_llm"]
RATIOS = ["0.25", "0.5", "0.75", "0.9"]


def cachepress(*arguments: str) -> tuple[str, float]:
    """Run a command of cachepress; the command in words, and its seconds."""
    words = [str(argument) for argument in arguments]
    print(f"$ cachepress {shlex.join(words)}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cachepress", *words], check=True, cwd=ROOT)
    return f"cachepress {shlex.join(words)}", time.perf_counter() - start


def bench(*arguments: str) -> Found:
    """Run ``cachepress bench``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bench.json")
        command, _ = cachepress("bench", *arguments, "--json", str(path))
        found = json.loads(path.read_text())
    return {"command": command.partition(" --json")[0], **found}


def decode() -> Found:
    """Decoding after 8,192 tokens, and after 8, which is what the model alone takes."""
    lengths = ["--lengths", "8192", "--steps", "40", "--repeats", "1"]
    floor = ["--lengths", "8", "8192", "--steps", "32", "--repeats", "1", "--presses", DECODE[-1]]
    return {"long": bench(*lengths, "--presses", *DECODE), "floor": bench(*floor)}


def long() -> Found:
    """A context of 65,536 tokens in a budget of 2,048 pairs."""
    return bench(
        *("--presses", "SnapKVPress(n_kept=2048)", "--lengths", "65536", "--no-baseline"),
        *("--prefill-chunk-size", "1024", "--prefill-mode", "online", "--beyond-trained-length"),
        *("--steps", "8", "--repeats", "1"),
    )


def sweep() -> Found:
    """A sweep against separate runs: the same answers, and how long each takes."""
    some = ["--fraction", "0.1"]
    with tempfile.TemporaryDirectory() as folder:
        what = ["--presses", *SIX, "--ratios", *RATIOS, *some]
        command, together = cachepress("sweep", *what, "--output-dir", f"{folder}/sweep")
        cells = [("no_press", None), *((press, ratio) for press in SIX for ratio in RATIOS)]
        seconds = []
        for press, ratio in cells:
            how = ["--press", press, *some]
            how += [] if ratio is None else ["--compression-ratio", ratio]
            how += ["--output-dir", f"{folder}/apart"]
            seconds.append(cachepress("evaluate", *how)[1])
        same, answers = _compared(Path(folder, "sweep"), Path(folder, "apart"))
        metrics = json.loads(next(Path(folder, "sweep").glob("*/metrics.json")).read_text())
    return {
        "command": command.partition(" --output-dir")[0],
        "machine": metrics["machine"],
        "together": together,
        "apart": seconds,
        "start": _start(),
        "contexts": metrics["score"]["contexts"],
        "same": same,
        "answers": answers,
    }


def _start() -> float:
    """Seconds until a run can begin: imports, and the model."""
    code = "import cachepress.evaluation; from cachepress.models import load; load('smollm2-135m')"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return time.perf_counter() - start


def quality() -> Found:
    """Scores on the built-in data, query-agnostic and query-aware, and read in chunks."""
    presses = ["knorm", "keydiff", "tova", "snapkv", "SnapKVPress(window_size=16)", "random"]
    parts = ["builtin:single_repeat-1000", "builtin:multi_key-1000"]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        base = ["sweep", "--ratios", "0.5", "0.75", "--datasets", *parts, "--query-aware", "both"]
        command, _ = cachepress(*base, "--presses", *presses, "--output-dir", f"{folder}/a")
        online = ["--prefill-mode", "online", "--prefill-chunk-size", "128"]
        what = ["--ratios", "0.5", "--datasets", parts[1], "--presses", "knorm", "keydiff"]
        more, _ = cachepress("sweep", *what, *online, "--output-dir", f"{folder}/b")
        for path in sorted(Path(folder).glob("*/*/metrics.json")):
            config = yaml.safe_load((path.parent / "config.yaml").read_text())
            what = {name: config[name] for name in ("data_dir", "press_name", "prefill_mode")}
            found.append({**what, **json.loads(path.read_text())})
    commands = [text.partition(" --output-dir")[0] for text in (command, more)]
    return {"commands": commands, "results": found}


def demo() -> Found:
    """What the demo prints."""
    with tempfile.TemporaryDirectory() as folder:
        cachepress("demo", "--output-dir", folder)
        metrics = json.loads(next(Path(folder).glob("*/metrics.json")).read_text())
        parts = Path(folder, "demo.md").read_text().rstrip().split("\n\n")
    tables = [part for part in parts if part.startswith("|")]
    return {"machine": metrics["machine"], "table": "\n\n".join(tables)}


SECTIONS: dict[str, Callable[[], Found]] = {
    f.__name__: f for f in (decode, long, sweep, quality, demo)
}


def _compared(one: Path, other: Path) -> tuple[int, int]:
    """Answers that two folders of results have in common, and how many there are."""
    same = answers = 0
    for path in sorted(one.glob("*/records.jsonl")):
        lines = [_answers(folder / path.parent.name / path.name) for folder in (one, other)]
        answers += len(lines[0])
        same += sum(lines[1].get(sample) == answer for sample, answer in lines[0].items())
    return same, answers


def _answers(path: Path) -> dict[int, str]:
    records = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
    return {record["sample_id"]: record["predicted_answer"] for record in records}


def page(data: dict[str, Found]) -> str:
    """docs/benchmarks.md, with the sections that were measured."""
    parts = [
        "# Benchmarks\n",
        "This page is made by `make benchmarks`. Ratios matter, seconds belong to the machine. All "
        "figures of a block come from the commands that stand there, one run of each; times of a "
        "step are medians of steps that were taken in turns.\n",
    ]
    writers = {f.__name__[1:]: f for f in (_decode, _long, _sweep, _quality, _demo)}
    return "\n".join(
        [*parts, *(write(data[name]) for name, write in writers.items() if name in data)]
    )


def _decode(found: Found) -> str:
    long, floor = found["long"], found["floor"]
    rows = [_row(cell, long["cells"][0]) for cell in long["cells"]]
    headers = ["cache", "ms a step", "ratio", "held MiB", "share of bytes", "press % of prefill"]
    small, whole, pressed = (_median(floor["cells"][i]) for i in (0, 2, 3))
    return (
        "## Decode time and bytes at 8,192 tokens\n\n"
        f"`{long['command']}` (`make bench`): {long['machine']}; a step of each cache in turn.\n\n"
        f"{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n\n"
        f"The model itself takes much of a step. `{floor['command']}`: with 8 tokens in its cache "
        f"it took {small:.1f} ms, with 8,192 in a `DynamicCache` {whole:.1f} ms and under AdaKV "
        f"{pressed:.1f} ms ({pressed / whole:.2f}). No compression can take less than "
        f"{small / whole:.2f} of the time of this small model at this length.\n"
    )


def _row(cell: dict, base: dict) -> list[str]:
    shares = [s / (p - s) for p, s in zip(cell["prefill"], cell["scoring"], strict=True)]
    name = "transformers' `DynamicCache`" if cell is base else f"`{cell['press']}`"
    return [
        name,
        f"{_median(cell):.1f}",
        f"{_median(cell) / _median(base):.2f}",
        f"{cell['held'] / 2**20:.1f}",
        f"{cell['held'] / base['held']:.2f}",
        f"{100 * statistics.median(shares):.1f}",
    ]


def _median(cell: dict) -> float:
    return 1000 * statistics.median(cell["decode"])


def _long(found: Found) -> str:
    (cell,) = found["cells"]
    return (
        "## A context of 65,536 tokens in a budget of 2,048 pairs\n\n"
        f"`{found['command']}`: {found['machine']}; {cell['prefill'][0]:.0f} s, "
        f"{cell['peak'] / 2**20:.0f} MiB at the peak above what was there before, "
        f"{cell['held'] / 2**20:.1f} MiB held, {_median(cell):.1f} ms a step. The model was "
        "trained for 8,192 tokens; nothing is said about its answers.\n"
    )


def _sweep(found: Found) -> str:
    apart, together, runs = sum(found["apart"]), found["together"], len(found["apart"])
    start = found["start"]
    bare = (apart - runs * start) / (together - start)
    return (
        "## One sweep against separate runs\n\n"
        f"`{found['command']}` ({found['contexts']} contexts) took {together:.0f} s; the {runs} "
        f"runs of `cachepress evaluate` for the same evaluations took {apart:.0f} s, "
        f"{apart / together:.1f} times as long; without the starts of the program ({start:.1f} s "
        f"each) {bare:.1f} times. {found['same']} of {found['answers']} answers are the same, "
        f"letter by letter. {found['machine']}.\n"
    )


def _quality(found: Found) -> str:
    rows = []
    for one in found["results"]:
        score = one["score"]
        rows.append(
            [
                one["data_dir"],
                one["prefill_mode"],
                one["press_name"],
                f"{one['compression_ratio']:.2f}",
                "yes" if one["query_aware"] else "no",
                f"{score['mean']:.3f}",
                f"{score['low']:.2f} to {score['high']:.2f}",
                str(score["samples"]),
            ]
        )
    headers = ["data", "prefill", "press", "ratio", "sees the question", "score"]
    headers += ["95 % interval", "answers"]
    rows.sort()
    commands = " and ".join(f"`{command}`" for command in found["commands"])
    return (
        "## Quality on the built-in data\n\n"
        f"{commands}.\n\n"
        f"{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n"
    )


def _demo(found: Found) -> str:
    return (
        "## The demo\n\n"
        f"`make demo`: {found['machine']}; 10 contexts of 1,000 tokens of prose with a number to "
        'be found in each. The press does not see the question but where it says "in sight". The '
        "second table is decoding after 8,000 tokens, of one sequence.\n\n"
        f"{found['table']}\n\n"
        "KVzip reads the context twice and loses nothing here; SnapKV keeps what the *end of the "
        "prompt* looks at, and does badly where the question comes later.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run sections, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--page", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}: wanted {', '.join(SECTIONS)}")
    data = json.loads(DATA.read_text()) if DATA.exists() else {}
    for name in [] if options.page else options.sections or SECTIONS:
        data[name] = SECTIONS[name]()
        write_atomically(DATA, json.dumps(data) + "\n")
    write_atomically(PAGE, page(data))


if __name__ == "__main__":
    main()
