"""What presses have to know of a tiny model, learned once for all tests."""

from functools import cache

import torch

import cachepress as cp
from cachepress.train import KINDS, Training, train
from tests.scratch import scratch
from tests.tiny import tiny, tokenizer, tokens


@cache
def learned(name: str = "llama", dtype: torch.dtype = torch.float64) -> str:
    """A folder with every artefact for the tiny model of an architecture."""
    folder = str(scratch())
    windows = [tokens(40, seed=seed) for seed in range(4)]
    press = cp.SnapKVPress(window_size=6)
    training = Training(tiny(name, dtype), windows, tokenizer(), press, steps=5, quiet=True)
    for kind in KINDS:
        train(kind, training, f"{folder}/{kind}.safetensors")
    return folder
