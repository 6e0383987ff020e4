"""Scoring asks a device for nothing: a host that waits lets a GPU run dry.

The device is a made-up one, whose tensors are counted whenever the host has to know one of their
numbers, or how many there are, and whenever numbers are copied to it or from it.
"""

import sys
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import cachepress as cp
from tests import placed
from tests.dense import mask_and_positions
from tests.laws.presses import LAYERS, RATIO, UNSUPPORTED, WRAPPERS, every_scorer, name_of
from tests.laws.test_matrix import QUESTION, batch
from tests.tiny import exact_tiny, tokenizer, tokens
from tests.tiny_cache import forward, kept
from tests.waiting import WAITING

DEVICE = torch.device("meta:0")
SCORERS = {name_of(press): press for press in every_scorer(RATIO)}
SCORERS |= {"PyramidKVPress": cp.PyramidKVPress(RATIO, window_size=6)}
WRAPPED = {
    name: wrapper.build(
        SCORERS["KeyDiffPress" if ("SnapKVPress", name) in UNSUPPORTED else "SnapKVPress"], RATIO
    )
    for name, wrapper in WRAPPERS.items()
    if name != "none"
}
PRESSES = {**SCORERS, **WRAPPED}
ONE_A_LAYER = {
    "CapPress": "ops/solve.py",
    "CompactorPress": "ops/solve.py",
    "LeverageScorePress": "ops/solve.py",
    "HeadKVPress": "presses/headkv.py",
}
"""Presses that ask whether a factorisation succeeded, or share out whole numbers of the model."""
ASKED_OF = ("score", "token_state", "merge", "pair_bias", "key_channels", "reconstructed")
"""What a press computes of a layer."""
NOT_COUNTED = ("ops/device.py", "artefacts/reading.py")
"""Copies from pinned memory, which nobody waits for, and of what is read once for a model."""
CHECKED = {
    "aten::bincount",
    "aten::linalg_cholesky",
    "aten::linalg_eigh",
    "aten::linalg_inv",
    "aten::linalg_lstsq",
    "aten::linalg_solve",
    "aten::linalg_svd",
}
"""Operations whose outcome the host looks at before it goes on."""


class Asked(TorchDispatchMode):
    """Remembers what the host asks of the device, and from which line of the package."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, given = func.name().partition(".")[0], kwargs or {}
        if waits(name, args, given) and not place().startswith(NOT_COUNTED):
            self.found.append((name, place()))
        return func(*args, **given)


def waits(name, args, given):
    """Whether the host waits for an operation, or moves numbers from one device to another."""
    if not args or not isinstance(args[0], torch.Tensor):
        return False
    first = args[0].device
    if name == "aten::copy_":
        return args[1].device != first
    if name == "aten::_to_copy":
        return torch.device(given.get("device") or first) != first
    if first != DEVICE:
        return False
    if name in placed.INDEXED:
        return any(i is not None and i.dtype == torch.bool for i in args[1])
    if name == "aten::repeat_interleave":
        return given.get("output_size") is None
    return name in WAITING or name in CHECKED


def place():
    """The nearest line of the package."""
    frame = sys._getframe(1)
    while frame.f_back and "/cachepress/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/cachepress/')[2]}:{frame.f_lineno}"


@pytest.fixture
def asked(monkeypatch):
    """What presses asked of the device while they computed, from where."""
    monkeypatch.setattr("cachepress.artefacts.kept._of_these_weights", lambda *_: True)
    found, tolist, inside = [], placed.Placed.tolist, []

    def listed(x):
        if inside:
            found.append(("tolist", place()))
        return tolist(x)

    def watched(method):
        def counted(self, *args):
            with nullcontext() if inside else Asked(found):
                inside.append(self)
                try:
                    return method(self, *args)
                finally:
                    inside.pop()

        return counted

    for kind in {type(press) for press in PRESSES.values()}:
        for name in ASKED_OF:
            monkeypatch.setattr(kind, name, watched(getattr(kind, name)))
    monkeypatch.setattr(placed.Placed, "tolist", listed)
    return found


def pressed(press, device):
    """What is kept of a padded prompt and of a further one."""
    model, cache = exact_tiny(), DynamicCache()
    _, ids, mask = batch("padded")
    more = tokens(9, batch=len(ids))
    inside = nullcontext()
    if device == DEVICE:
        placed.spread(model, (str(DEVICE), str(DEVICE)))
        inside = placed.devices()
    with inside, press(model, question=QUESTION, tokenizer=tokenizer()):
        ids, mask, more = (x.to(device) for x in (ids, mask, more))
        longer = torch.cat([mask, torch.ones_like(more)], dim=1)
        forward(model, cache, input_ids=ids, **mask_and_positions(mask, 0, ids.shape[1]))
        forward(model, cache, input_ids=more, **mask_and_positions(longer, ids.shape[1], 9))
        return kept(cache)


@pytest.mark.counts
@pytest.mark.parametrize("name", PRESSES)
def test_scoring_asks_the_device_for_nothing(name, asked):
    press = PRESSES[name]
    found = pressed(press, DEVICE)
    once, layers = ONE_A_LAYER.get(name, "nowhere"), 2 * LAYERS
    expected = [(what, where) for what, where in asked if where.startswith(once)]
    assert len(expected) <= layers and set(asked) == set(expected)
    assert found == pressed(press, torch.device("cpu"))
