import cachepress as cp
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import kept, pressed


def test_layers_and_heads_differ_runs_repeat_and_seeds_count():
    model, ids = tiny(), tokens(60)
    first = kept(pressed(model, cp.RandomPress(0.5), ids))
    assert first == kept(pressed(model, cp.RandomPress(0.5), ids))
    heads = [tuple(head) for layer in first for head in layer[0]]
    assert len(set(heads)) == 8
    assert first != kept(pressed(model, cp.RandomPress(0.5, seed=1), ids))


def test_every_place_is_as_likely():
    model = tiny()
    counts = [0] * 40
    for seed in range(100):
        for layer in kept(pressed(model, cp.RandomPress(0.5, seed=seed), tokens(40))):
            for head in layer[0]:
                for position in head:
                    counts[position] += 1
    assert sum(counts) == 100 * 8 * 20
    assert min(counts) > 320 and max(counts) < 480
