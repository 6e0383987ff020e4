"""The command: starts workers, ends them when their time is up, and writes the page.

It imports nothing but Python's own library and texts, so that it is never what hangs.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import date
from pathlib import Path

from benchmarks.card.page import COMMAND, page
from benchmarks.card.plan import SECTIONS, Job, allowed, grace, sizes_of
from benchmarks.card.records import LINE, Record
from benchmarks.card.wanted import wanted
from benchmarks.card.worker import BROKEN, NO_DEVICE

ROOT = Path(__file__).parents[2]
DOCS, TRIED = ROOT / "docs", ROOT / "results" / "gpu"
DATA, PAGE = "gpu.json", "gpu.md"
LAST = 4.0
"""Seconds at the end for ending a worker and writing the page."""
POLL = 0.2
MOST_STARTS = 8
WORKER = ("-m", "benchmarks.card.worker")


def main(text: str | None, arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the JSON and the page."""
    start, options = time.time(), _options(text, arguments)
    folder = Path(options.output or (TRIED if options.tiny else DOCS))
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / DATA
    if not options.page:
        device = "cpu" if options.tiny else "cuda"
        given = sys.argv[1:] if arguments is None else arguments
        before = data.read_text(encoding="utf-8") if data.exists() else None
        begun(options, given, data).write(data)
        end = start + 60 * options.minutes - LAST
        names = [name for name in SECTIONS if name in options.sections or not options.sections]
        job = Job(
            data=str(data),
            sections=names,
            end=end,
            minutes=options.minutes,
            device=os.environ.get("DEV", device),
            tiny=options.tiny,
            kvpress_python=options.kvpress_python,
        )
        if not run(job):
            data.unlink() if before is None else data.write_text(before, encoding="utf-8")
            sys.exit("no GPU is here that torch can use: --tiny tries every section on a CPU")
        record = Record.read(data)
        record.seconds, record.running = time.time() - start, []
        record.write(data)
    record = Record.read_if_any(data)
    text = page((DOCS / PAGE).read_text(encoding="utf-8"), record)
    (folder / PAGE).write_text(text, encoding="utf-8")
    if record is not None:
        for one in wanted(record):
            value = "-" if one.value is None else f"{one.value:.3g}"
            print(f"{one.said}: {one.what}: {value} ({'>=' if one.least else '<='} {one.bound})")
    print(f"{folder / PAGE}")


def begun(options: argparse.Namespace, given: Sequence[str], data: Path) -> Record:
    """Begin a record; with some sections, the others stay if sizes are the same."""
    before = Record.read_if_any(data) if options.sections else None
    sizes = sizes_of(options.tiny)
    if before is None or before.sizes != sizes:
        before = Record(sizes=sizes)
    for name in options.sections or SECTIONS:
        before.sections.pop(name, None)
    command = f"{COMMAND.partition(' --')[0]} {shlex.join(given)}".rstrip()
    return Record(
        date=date.today().isoformat(),
        command=command,
        minutes=options.minutes,
        sizes=sizes,
        machine=before.machine,
        sections=before.sections,
    )


def run(job: Job) -> bool:
    """Run workers until every section was tried or the time is up; whether there is a device."""
    left = list(job.sections)
    for _ in range(MOST_STARTS):
        if not left or time.time() > job.end:
            break
        own = Job(**{**asdict(job), "sections": left})
        code = worked(own)
        if code == NO_DEVICE:
            return False
        left = ended(job, left, code)
    record = Record.read(Path(job.data))
    for name in left:
        record.section(name)
    record.write(Path(job.data))
    return True


def worked(job: Job) -> int | None:
    """Run one worker; its return code, or None where it was killed for its time."""
    command = [sys.executable, *WORKER, json.dumps(asdict(job))]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # A group of its own: what it started, such as compilers, ends with it.
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, start_new_session=True
    )
    try:
        return _watched(process, job)
    finally:
        if process.poll() is None:
            _kill(process)


def _watched(process: subprocess.Popen, job: Job) -> int | None:
    """Wait for a worker; its return code, or None where its time or its section's is up."""
    section, since = "", 0.0
    while process.poll() is None:
        now, running = time.time(), Record.read(Path(job.data)).running
        if running and running[0] != section:
            section, since = running[0], now
        late = running and now > since + allowed(section, job.minutes) + grace(job.minutes)
        if now > job.end or late:
            return None
        time.sleep(POLL)
    return process.returncode


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # Where a driver holds it, it stays, and the page is written nevertheless.
    with suppress(subprocess.TimeoutExpired):
        process.wait(LAST / 2)


def ended(job: Job, left: Sequence[str], code: int | None) -> list[str]:
    """Note how a worker ended, and return the sections that are left."""
    path = Path(job.data)
    record = Record.read(path)
    why = "killed when its time was up" if code is None else f"its process ended with {code}"
    if code == 0:
        return []
    if record.running:
        name, cell = record.running
        record.section(name).cells[cell] = {LINE: why}
        if code is None:
            record.section(name).state = "cut"
        record.running = []
        print(f"{name}: {cell}: {why}", flush=True)
    elif code not in (BROKEN, None):
        # It never came to a cell, and another worker would not either.
        first = record.section(left[0])
        first.state, first.cells["start"] = "cut", {LINE: f"no worker started: {why}"}
    record.write(path)
    return [name for name in left if record.section(name).state in ("not reached", "running")]


def _options(text: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=6.0, help="it ends within (default: 6)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--page", action="store_true", help="write the page, measure nothing")
    parser.add_argument("--output", help=f"folder of {DATA} and {PAGE} (default: docs)")
    parser.add_argument("--kvpress-python", help="an interpreter that has kvpress")
    options = parser.parse_args(arguments)
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"unknown section {name!r}: wanted one of {', '.join(SECTIONS)}")
    return options
