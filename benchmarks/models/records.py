"""Keeps one record for each model type, so that an interrupted run goes on."""

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

from benchmarks.models.page import DATA
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
