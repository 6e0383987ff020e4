"""Prints the instructions that torch can be told to use in place of the machine's own."""

import torch


def elsewhere(own: str) -> str:
    """A value of ``ATEN_CPU_CAPABILITY`` that is not ``own``, where there is one."""
    if own == "DEFAULT" or not own.startswith("AVX"):
        return "default"
    return "default" if own == "AVX2" else "avx2"


if __name__ == "__main__":
    print(elsewhere(torch.backends.cpu.get_cpu_capability()))
