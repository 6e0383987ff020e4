"""Synchronisation with a device."""

import torch


def wait(device: torch.device) -> None:
    """Wait until a device finished all queued work, so that times measured are true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
