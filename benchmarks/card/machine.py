"""Names the card, and the versions of what it runs."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import cachepress
from benchmarks.card.lab import GIB
from benchmarks.card.records import Values


def machine(device: torch.device) -> Values:
    """Describe the device and the libraries."""
    found: Values = {"card": f"{platform.machine()} CPU, {torch.get_num_threads()} threads"}
    if device.type == "cuda":
        own = torch.cuda.get_device_properties(device)
        found = {
            "card": own.name,
            "memory_gib": round(own.total_memory / GIB),
            "multiprocessors": own.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return {
        **found,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "cachepress": cachepress.__version__,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
