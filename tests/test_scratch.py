"""Folders that killed test runs left are removed by the next one, and those in use are not."""

import os
import subprocess
import sys

from tests import scratch as places
from tests.scratch import scratch

KILLED = """
import os, signal
from tests.scratch import scratch
folder = scratch()
(folder / "lukv.safetensors").write_text("x")
print(folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_left_is_gone_after_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "gettempdir", lambda: str(tmp_path))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment, stdout=subprocess.PIPE)
    assert done.returncode == -9 and [str(x) for x in tmp_path.iterdir()] == [
        done.stdout.decode().strip()
    ]
    living = tmp_path / f"cachepress-tests-{os.getppid()}-x"
    living.mkdir()
    (tmp_path / "cachepress-tests-other").mkdir()
    scratch()
    assert sorted(x.name for x in tmp_path.iterdir()) == [living.name, "cachepress-tests-other"]


def test_a_folder_is_gone_with_its_process(tmp_path):
    code = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
