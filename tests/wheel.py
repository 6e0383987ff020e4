"""Builds the wheel, and runs the README's first snippet from it where nothing else is installed.

Then it installs a clone named cachepress in place, and imports the package from the folder above.

python -m tests.wheel
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*command: str | Path, where: Path, environment: Mapping[str, str]) -> str:
    """Run a command; what it prints."""
    done = subprocess.run(command, cwd=where, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}")
    return done.stdout.strip()


def main() -> None:
    """Build, install, run, compare."""
    code = re.search(r"```python\n(.*?)```\n\nIt prints `(.*?)`", TEXT, re.DOTALL)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = folder / "cachepress"
        tracked = run("git", "ls-files", where=ROOT, environment=environment).splitlines()
        for (
            path
        ) in tracked:  # A build folder that lies about would put stale modules into the wheel.
            (sources / path).parent.mkdir(parents=True, exist_ok=True)
            (sources / path).write_bytes((ROOT / path).read_bytes())
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        run(*pip, "wheel", "--no-deps", sources, where=folder, environment=environment)
        (wheel,) = folder.glob("*.whl")
        constraint = ROOT / "constraints.txt"
        what = ["install", "--constraint", constraint, f"{wheel}[models]"]
        run(*pip, *what, where=folder, environment=environment)
        printed = run(python, "-W", "ignore", "-c", code[1], where=folder, environment=environment)
        run(*pip, "uninstall", "--yes", "cachepress", where=folder, environment=environment)
        # The folder has the package's name, and is no package: only a path beside it helps.
        run(*pip, "install", "--no-deps", "-e", sources, where=folder, environment=environment)
        where = "import cachepress; print(cachepress.__version__, cachepress.__file__)"
        found = run(python, "-c", where, where=folder, environment=environment)
    if found.split() != [wheel.name.split("-")[1], str(sources / "cachepress" / "__init__.py")]:
        sys.exit(f"from the folder above a clone that was installed in place: {found}")
    if printed != code[2]:
        sys.exit(f"{wheel.name}: the README's first snippet printed {printed!r}, not {code[2]!r}")
    print(f"{wheel.name}: {printed}")


if __name__ == "__main__":
    main()
