"""Real processes, interrupted and killed for real."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from cachepress.evaluation.cell import RECORDS
from cachepress.interrupts import Interrupted, Interrupts
from tests.tiny import words

WORKERS = ("multiprocessing-fork", "ray::Worker", "default_worker.py")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture
def command(model_dir, tmp_path):
    """A sweep that takes a while, and the folder where it writes."""
    data = tmp_path / "many.jsonl"
    rows = [
        {"context": words(60, seed=i), "question": "w9", "answer": ["w5"], "max_new_tokens": 40}
        for i in range(200)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    found = [sys.executable, "-m", "cachepress", "sweep", "--presses", "knorm", "--ratios", "0.5"]
    found += ["--datasets", str(data), "--models", model_dir, "--device", "cpu"]
    return [*found, "--batch-size", "1", "--output-dir", str(out)], out


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    )


def until(true, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def n_lines(folder) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(f"*/{RECORDS}"))


@pytest.mark.parametrize("number", CODES)
def test_an_interrupted_run_says_so(command, number):
    arguments, out = command
    process = start(arguments)
    until(lambda: n_lines(out) >= 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == CODES[number]
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert err.strip().splitlines()[-1] == (
        f"cachepress: error: {word}: every finished context is on disk, the same command goes on"
    )
    assert "Traceback" not in err
    assert n_lines(out) >= 3


@pytest.mark.parametrize(
    ("number", "seconds"),
    [(signal.SIGINT, 0.1), (signal.SIGTERM, 0.5), (signal.SIGINT, 1.2), (signal.SIGINT, 2.5)],
)
def test_an_interrupt_of_the_imports_leaves_no_traceback(command, number, seconds):
    arguments, _ = command
    process = start(arguments)
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    # Before the command begins the signal itself ends the process; a shell says 130 or 143 to both.
    assert process.returncode in (CODES[number], -number)
    assert "Traceback" not in err and "Exception ignored" not in err
    assert len([line for line in err.splitlines() if not line.startswith("INFO")]) <= 1


@pytest.mark.parametrize("seconds", [0.3, 3.0])
def test_ctrl_c_in_a_terminal_reaches_workers_too_and_they_are_silent(command, seconds):
    """A terminal interrupts the whole group of processes, wherever each of them stands."""
    arguments, _ = command
    process = start([*arguments, "--executor", "process", "--workers", "2"])
    parent = psutil.Process(process.pid)
    until(lambda: len(spawned(parent)) == 2)
    workers = spawned(parent)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("cachepress: error: interrupted: every")
    until(lambda: not any(map(alive, workers)), seconds=30)


@pytest.mark.parametrize(
    ("executor", "number"),
    [("process", signal.SIGKILL), ("process", signal.SIGTERM), ("ray", signal.SIGKILL)],
)
def test_workers_end_with_the_command_however_it_ends(command, executor, number):
    arguments, out = command
    process = start([*arguments, "--executor", executor, "--workers", "2"])
    until(lambda: n_lines(out) >= 2)
    children = psutil.Process(process.pid).children(recursive=True)
    # Two small processes of Ray's own may outlive a killed command; none that holds a model does.
    workers = [c for c in children if any(name in " ".join(line(c)) for name in WORKERS)]
    assert workers
    process.send_signal(number)
    process.wait(timeout=60)
    process.stderr.close()
    try:
        until(lambda: not any(map(alive, workers)), seconds=30)
    finally:
        for child in children:
            with suppress(psutil.Error):
                child.kill()


def spawned(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if WORKERS[0] in " ".join(line(child))]


def line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_interrupt_that_hits_a_finaliser_comes_again():
    class Slow:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    with Interrupts() as interrupts, pytest.raises(Interrupted):
        Slow()
        assert interrupts.number == signal.SIGINT
        time.sleep(10)


def test_ignored_signals_stay_ignored_and_others_are_given_back():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
