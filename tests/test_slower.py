"""The guard against slow-down sees a slower version, and none where there is none."""

import shutil
from pathlib import Path

import cachepress
from tests import slower

SLOW = """
import time
from cachepress.cache.layer import CompressedLayer
_update = CompressedLayer.update
def update(self, *args, **kwargs):
    time.sleep(0.004)
    return _update(self, *args, **kwargs)
CompressedLayer.update = update
"""


def test_a_slower_version_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(slower, "ROUNDS", 3)
    package = Path(cachepress.__file__).parent
    shutil.copytree(package, tmp_path / "cachepress", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "cachepress" / "generation" / "prefill.py").open("a").write(SLOW)
    found = slower.compare(package.parent, tmp_path)
    assert found["32 decoded tokens"] > slower.MOST


def test_a_repository_without_a_parent_is_said(capsys):
    assert slower.run(["--parent", "no-such-commit"]) == 0
    assert "no no-such-commit to compare with" in capsys.readouterr().out
