"""Real processes, interrupted and killed for real."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest

from cachepress.evaluation.run import RECORDS
from cachepress.interrupts import NUMBERS, Interrupted, Interrupts, children_ignore_sigint
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


def test_a_terminated_run_says_so(command):
    arguments, out = command
    process = start(arguments)
    until(lambda: n_lines(out) >= 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 143
    assert err.strip().splitlines()[-1] == (
        "cachepress: error: terminated: every finished context is on disk, the same command goes on"
    )
    assert "Traceback" not in err
    assert n_lines(out) >= 3


@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGINT, 0.1), (signal.SIGTERM, 0.5), (signal.SIGINT, 1.5)]
)
def test_an_interrupt_of_the_imports_leaves_no_traceback(command, number, seconds):
    arguments, _ = command
    process = start(arguments)
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    # Before the command begins the signal itself ends the process; a shell says 130 or 143 to both.
    assert process.returncode in (CODES[number], -number)
    assert "Traceback" not in err and "Exception ignored" not in err
    assert len([line for line in err.splitlines() if not line.startswith("INFO")]) <= 1


def test_ctrl_c_in_a_terminal_reaches_workers_too_and_they_are_silent(command):
    """A terminal interrupts the whole group of processes, wherever each of them stands."""
    arguments, _ = command
    process = start([*arguments, "--executor", "process", "--workers", "2"])
    parent = psutil.Process(process.pid)
    until(lambda: spawned(parent))
    os.killpg(process.pid, signal.SIGINT)
    workers = spawned(parent)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("cachepress: error: interrupted: every")
    until(lambda: not any(map(alive, workers)))


POOL = """
import os, pickle, sys, time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import active_children, get_context
from cachepress.interrupts import Interrupts, children_ignore_sigint, start_worker

begin = pickle.dumps(partial(time.sleep, float(sys.argv[1])))
with Interrupts() as interrupts:
    pool = ProcessPoolExecutor(2, get_context("spawn"), start_worker, (begin,))
    try:
        with children_ignore_sigint():
            work = [pool.submit(time.sleep, 100) for _ in range(2)]
        print("begun", flush=True)
        work[0].result()
    except KeyboardInterrupt:
        for child in active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)
        os._exit(128 + interrupts.number)
"""
"""Workers as those of a sweep, of which none loads a model."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("starting", [0, 100])
def test_workers_end_silently_with_their_parent_wherever_they_are(number, starting):
    process = subprocess.Popen(
        [sys.executable, "-c", POOL, str(starting)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    parent = psutil.Process(process.pid)
    until(lambda: len(spawned(parent)) == 2)  # Until Python runs in one it looks like its parent.
    workers = spawned(parent)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        until(lambda: all(map(is_watched, workers)))
        process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == CODES.get(number, -number)
    # Of a killed process, semaphores are left, which the tracker of Python itself cleans up.
    assert err == "" or (number == signal.SIGKILL and "Traceback" not in err)
    until(lambda: not any(map(alive, workers)))


def is_watched(worker: psutil.Process) -> bool:
    """Whether a worker has begun to look after its parent: by then it has two threads."""
    return worker.num_threads() > 1


def test_a_signal_while_a_child_is_started_comes_afterwards():
    """Also where the system gives it to a thread that does not block it."""
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    reached = False
    try:
        with Interrupts() as interrupts, pytest.raises(Interrupted):
            with children_ignore_sigint():
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
                reached = True
            time.sleep(10)
        assert reached and interrupts.number in NUMBERS
    finally:
        over.set()
        other.join()


@pytest.mark.parametrize("executor", ["process", "ray"])
def test_workers_end_with_a_killed_command(command, executor):
    arguments, out = command
    process = start([*arguments, "--executor", executor, "--workers", "1"])
    until(lambda: n_lines(out) >= 2)
    children = psutil.Process(process.pid).children(recursive=True)
    # Two small processes of Ray's own may outlive a killed command; none that holds a model does.
    workers = [c for c in children if any(name in " ".join(line(c)) for name in WORKERS)]
    assert workers
    process.kill()
    process.wait(timeout=60)
    process.stderr.close()
    try:
        until(lambda: not any(map(alive, workers)))
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
    # A library that another test used may have left its own way with them.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    other = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, other)
