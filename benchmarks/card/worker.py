"""Measures sections cell by cell, in a process that can be killed at any moment.

What raises becomes a line in its cell. The JSON is written after every cell. Where the device is of
no use any more the process ends, and the command starts another, which goes on after that cell.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.card.plan import Job, allowed
from benchmarks.card.records import LINE, NO_TIME, Record, Values, guarded, told

BROKEN, NO_DEVICE = 3, 4
"""What the process returns where its device cannot be used any more, and where there is none."""


def main(text: str) -> int:
    """Measure a job's sections."""
    job = Job(**json.loads(text))
    import torch
    import transformers

    from benchmarks.card.lab import Lab
    from benchmarks.card.machine import machine
    from benchmarks.card.sections import CELLS

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if job.device == "cuda" and not torch.cuda.is_available():
        return NO_DEVICE
    gc.freeze()  # What was imported is looked through at every collection else.
    lab = Lab(job)
    record = Record.read(Path(job.data))
    record.machine = machine(torch.device(job.device))
    for name in job.sections:
        if not measure(record, name, CELLS[name](lab), job, lab.healthy):
            return BROKEN
        lab.forget()
    return 0


def measure(
    record: Record,
    name: str,
    cells: Iterable[tuple[str, Callable[[], Values]]],
    job: Job,
    healthy: Callable[[], bool],
) -> bool:
    """Measure the cells of a section that are not there yet; whether the device is well."""
    section, start, path = record.section(name), time.time(), Path(job.data)
    before, end = section.seconds, min(job.end, start + allowed(name, job.minutes))
    section.state = "running"
    well, cut = True, False
    for cell, work in cells:
        if cell in section.cells:
            continue
        if not well:
            break
        if time.time() > end:
            section.cells[cell], cut = {LINE: NO_TIME}, True
            continue
        record.running = [name, cell]
        record.write(path)
        section.cells[cell] = guarded(work)
        section.seconds = before + time.time() - start
        well = LINE not in section.cells[cell] or healthy()
        print(f"{name}: {cell}: {told(section.cells[cell])}", flush=True)
        record.write(path)
    record.running = []
    section.state = "running" if not well else "cut" if cut else "done"
    record.write(path)
    return well


if __name__ == "__main__":
    returned = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(returned)  # Nothing is left to do, and libraries take long to say goodbye.
