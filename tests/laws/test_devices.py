"""A model that is spread over two devices: what meets is brought to one, and the result back."""

import pytest
import torch
from transformers import DynamicCache

from cachepress.hf import cache_argument
from tests.bounds import close
from tests.dense import mask_and_positions
from tests.laws.test_matrix import QUESTION, batch, build, each
from tests.placed import devices, spread
from tests.tiny import exact_tiny, tokens
from tests.tiny_cache import kept

TRIED = [
    (scorer, wrapper)
    for scorer, wrapper in each()
    if wrapper != "none" or scorer in ("KVzipPress", "KVgradPress", "FastKVzipPress", "FinchPress")
]
"""Every wrapper, and the scorers that are given more than what one layer computed."""
OVER = ("meta:0", "meta:1")


def run(model, press, ids, mask, device, storage="full"):
    cache, name, b = DynamicCache(), cache_argument(model), len(ids)
    ids = ids.to(device)
    mask = None if mask is None else mask.to(device)
    out = []
    with torch.no_grad(), press(model, question=QUESTION, storage=storage):
        model(ids, **{name: cache}, **mask_and_positions(mask, 0, ids.shape[1]))
        seen = ids.shape[1]
        for seed in range(9):
            mask = None if mask is None else torch.cat([mask, mask.new_ones(b, 1)], dim=1)
            step = tokens(1, batch=b, seed=seed).to(device)
            out.append(model(step, **{name: cache}, **mask_and_positions(mask, seen, 1)).logits)
            seen += 1
    return kept(cache), torch.cat(out, dim=1).cpu()


@pytest.mark.parametrize(("scorer", "wrapper"), TRIED)
def test_every_press_does_there_what_it_does_on_one_device(scorer, wrapper, monkeypatch):
    # Weights are told apart by their bytes in memory, which these devices have not.
    monkeypatch.setattr("cachepress.artefacts.kept._of_these_weights", lambda *_: True)
    press = build(scorer, wrapper)
    _, ids, mask = batch("padded" if len(scorer) % 2 else "alone")
    wanted = run(exact_tiny(), press, ids, mask, "cpu")
    with devices():
        ours = run(spread(exact_tiny(), OVER), press, ids, mask, OVER[0])
    assert ours[0] == wanted[0]
    close(ours[1], wanted[1])
