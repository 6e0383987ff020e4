"""A model that is spread over two devices: what meets is brought to one, and the result back.

Nothing else leaves its device: no keys, no values, and no scores but where all layers compete.
"""

import pytest
import torch
from transformers import DynamicCache

from cachepress.cache.batch import compressed_layers
from cachepress.hf import cache_argument
from tests.bounds import close
from tests.dense import mask_and_positions
from tests.laws.presses import LAYERS
from tests.laws.test_matrix import QUESTION, batch, build, each
from tests.placed import MOVES, devices, spread
from tests.tiny import exact_tiny, tokens
from tests.tiny_cache import kept

TRIED = [
    (scorer, wrapper)
    for scorer, wrapper in each()
    if wrapper != "none" or scorer in ("KVzipPress", "KVgradPress", "FastKVzipPress", "FinchPress")
]
"""Every wrapper, and the scorers that are given more than what one layer computed."""
ALONE = [
    scorer for scorer, wrapper in each() if wrapper == "none" and (scorer, wrapper) not in TRIED
]
"""The other scorers, of which what is stored and what is copied is looked at."""
OVER = ("meta:0", "meta:1")


def run(model, press, ids, mask, device, storage="full"):
    MOVES.clear()
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
    stays_where_it_is(press, cache, device)
    return kept(cache), torch.cat(out, dim=1).cpu()


def stays_where_it_is(press, cache, device):
    """Pairs are stored where their layer is, and nothing that has heads is copied elsewhere."""
    places = [OVER[i >= LAYERS // 2] if device in OVER else device for i in range(LAYERS)]
    for layer, place in zip(compressed_layers(cache), places, strict=True):
        assert {x.device for x in layer.tensors()} == {torch.device(place)}
    large = {shape for *_, shape in MOVES if len(shape) > 2}
    if press.budget.scope == "model":
        large = {shape for shape in large if len(shape) > 3}  # Scores, and what is kept.
    # A gradient goes back through the model by the ways of its hooks.
    gradient = press.needs.reconstruction and press.needs.reconstruction.gradient
    assert not large or gradient


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


@pytest.mark.parametrize("scorer", ALONE)
def test_no_scorer_moves_what_it_scores(scorer, monkeypatch):
    monkeypatch.setattr("cachepress.artefacts.kept._of_these_weights", lambda *_: True)
    press, cache, (_, ids, _) = build(scorer, "none"), DynamicCache(), batch("alone")
    MOVES.clear()
    with devices(), torch.no_grad():
        model = spread(exact_tiny(), OVER)
        with press(model, question=QUESTION):
            model(ids.to(OVER[0]), **{cache_argument(model): cache})
        stays_where_it_is(press, cache, OVER[0])


def test_what_is_moved_is_seen():
    MOVES.clear()
    with devices():
        x = torch.ones(1, 2, 3, device=OVER[0])
        (x.to(OVER[1]) + 1).cpu()
        torch.ones(2).to(OVER[0])
    one, other = map(torch.device, OVER)
    assert [(one, other, x.shape), (other, torch.device("cpu"), x.shape)] == MOVES
