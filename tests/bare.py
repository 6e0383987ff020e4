"""An environment of its own that has torch, Triton and transformers, and what they need."""

import importlib.metadata
import re
import venv
from pathlib import Path

from packaging.requirements import Requirement


def bare(folder: Path) -> str:
    """Make the environment from what is installed here, and return its interpreter."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in _needed(["torch", "transformers", "triton"]):
        for file in distribution.files or ():
            link = site / file.parts[0]
            if file.parts[0] != ".." and not link.exists():
                link.symlink_to(str(distribution.locate_file(file.parts[0])))
    return str(folder / "bin" / "python")


def _needed(names: list[str]) -> list[importlib.metadata.Distribution]:
    """The distributions of these names, and what they require without extras."""
    found: dict[str, importlib.metadata.Distribution] = {}
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # Such as libraries of GPUs, which a build for CPUs is without.
        for need in map(Requirement, found[name].requires or ()):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                names.append(need.name)
    return list(found.values())
