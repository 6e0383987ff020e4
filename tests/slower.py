"""Whether this version is slower than its parent: both measured in turns, on the CPU.

``python -m tests.slower`` compares the working tree with the commit before it. The two run as
processes of their own that wait for each other, so whatever else the machine does hits both.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROUNDS = 9
MOST = 1.3
"""Times as slow as the parent, from which a measurement counts as slower."""
MEASURED = ("prefill and compression", "32 decoded tokens")
CHILD = """
import sys, time, torch, cachepress as cp
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=6, **sizes)).eval()
ids = torch.randint(512, (1, 1024))
press = cp.AdaKVPress(cp.SnapKVPress(0.75))
for _ in sys.stdin:
    with torch.no_grad():
        start = time.perf_counter()
        cache = cp.prefill(model, ids, press)
        read = time.perf_counter()
        for step in range(32):
            model(ids[:, step : step + 1], past_key_values=cache)
        done = time.perf_counter()
    print(read - start, done - read, flush=True)
"""


def run(arguments: list[str] | None = None) -> int:
    """Measure, say what was found, and return 1 if this version is slower."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", default="HEAD~1", help="the commit to compare with")
    parent = parser.parse_args(arguments).parent
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", parent, "cachepress"], cwd=ROOT, capture_output=True, check=False
        )
        if archive.returncode:
            print(f"there is no {parent} to compare with: nothing was measured")
            return 0
        subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
        # What is slower is so every time; what else the machine does is not.
        return int(all(is_slower(Path(folder)) for _ in range(3)))


def is_slower(parent: Path) -> bool:
    """Compare once, and say what was found."""
    found = compare(parent, ROOT)
    for name, ratio in found.items():
        print(f"{name}: {ratio:.2f} times the parent's seconds, the median of {ROUNDS} pairs")
    return max(found.values()) > MOST


def compare(parent: Path, head: Path) -> dict[str, float]:
    """The median of head's seconds over the parent's, for each measurement."""
    children = [started(parent), started(head)]
    ratios: dict[str, list[float]] = {name: [] for name in MEASURED}
    for i in range(ROUNDS + 1):
        order = (0, 1) if i % 2 else (1, 0)
        seconds = {which: once(children[which]) for which in order}
        if i:  # The first round warms up.
            for name, before, after in zip(MEASURED, seconds[0], seconds[1], strict=True):
                ratios[name].append(after / before)
    for child in children:
        child.communicate()
    return {name: statistics.median(values) for name, values in ratios.items()}


def started(root: Path) -> subprocess.Popen[str]:
    """A process that measures the package in a folder once for each line that it reads."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-W", "ignore", "-c", CHILD]
    return subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes)


def once(child: subprocess.Popen[str]) -> list[float]:
    """The seconds of one round."""
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    return [float(x) for x in child.stdout.readline().split()]


if __name__ == "__main__":
    sys.exit(run())
