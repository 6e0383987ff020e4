"""Tries every causal model type of transformers under a press, and writes docs/models.md.

python -m benchmarks.models                # all types that have no record yet, some minutes
python -m benchmarks.models llama gemma2   # these types, again
python -m benchmarks.models --page         # nothing is run, the page is written again
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
import transformers

from benchmarks.models.page import DATA, PAGE, page
from benchmarks.models.tiny import types
from cachepress.evaluation.records import write_atomically

RECORDS = Path(__file__).parents[2] / "results" / "models"
SECONDS, BYTES = 120, 8 << 30
"""What one type may take."""
Record = dict[str, object]


def run(kind: str) -> None:
    """Check one type, and write its record; in a process of its own."""
    from benchmarks.models.checks import record_of

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    write_atomically(path_of(kind), json.dumps(record_of(kind)) + "\n")


def path_of(kind: str) -> Path:
    """The file of a type's record, which belongs to one version of transformers."""
    return RECORDS / transformers.__version__ / f"{kind}.json"


def record(kind: str, context: ForkServerContext) -> Record:
    """Check one type, or say why that did not end."""
    start = time.monotonic()
    process = context.Process(target=run, args=(kind,))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    if not path_of(kind).exists():
        took = f"{time.monotonic() - start:.0f} s"
        lost: Record = {"status": "wrong", "reason": f"the process ended after {took}"}
        write_atomically(path_of(kind), json.dumps(lost) + "\n")
    return json.loads(path_of(kind).read_text())


def main(arguments: Sequence[str] | None = None) -> None:
    """Check types, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="model types (default: all without a record)")
    parser.add_argument("--page", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    unknown = [kind for kind in options.types if kind not in types()]
    if unknown:
        parser.error(f"unknown model type {unknown[0]!r}: wanted one of transformers' causal types")
    if not options.page:
        check_all(options.types)
    found = json.loads(DATA.read_text())
    write_atomically(PAGE, page(PAGE.read_text(encoding="utf-8"), found))


def check_all(again: Sequence[str]) -> None:
    """Check types that have no record, and those that are asked for, and write the data."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.models.checks"])
    path_of("").parent.mkdir(parents=True, exist_ok=True)
    for kind in again:
        path_of(kind).unlink(missing_ok=True)
    records = {}
    for kind in again or types():
        known = path_of(kind).exists()
        found = record(kind, context) if not known else json.loads(path_of(kind).read_text())
        if not known:
            print(f"{kind}: {found['status']} {found['reason']}", file=sys.stderr, flush=True)
    for kind in types():
        if path_of(kind).exists():
            records[kind] = json.loads(path_of(kind).read_text())
    data = {"transformers": transformers.__version__, "torch": torch.__version__, "types": records}
    write_atomically(DATA, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
