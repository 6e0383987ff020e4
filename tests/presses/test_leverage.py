from dataclasses import replace

import numpy as np
import pytest
import torch

import cachepress as cp
from cachepress.presses.leverage import LeverageScorePress, gaussian
from tests.bounds import EXACT, close
from tests.tiny import exact_tiny as tiny
from tests.tiny import rand, randn, tokens
from tests.tiny_cache import forward, kept, pressed

SEEN = {}
RIDGE = 1e-2


class Recording(LeverageScorePress):
    def score(self, view):
        SEEN[view.depth] = view, super().score(view)
        return SEEN[view.depth][1]


def bare_keys(model, ids):
    """Keys before RoPE as the layers' own projections gave them, ``[T, H, D]`` by layer."""
    found = []
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(
            lambda module, given, out: found.append(out[0].view(-1, 2, 8).double().numpy())
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def leverages(x, ridge):
    """Diagonal of the hat matrix of centred keys."""
    x = x - x.mean(0)
    return np.diag(x @ np.linalg.inv(x.T @ x + ridge * np.eye(x.shape[1])) @ x.T)


def check(scores, wanted):
    wanted = np.array(wanted)
    close(scores, (wanted - wanted.mean()) / wanted.std(ddof=1))


def check_exact(scores, keys, matrix):
    """Scores are leverages of projected ``keys [H, T, D]``, which are those of the keys.

    But for the ridge: it takes of each direction what it is of the square of its length.
    """
    ridged = [leverages(x @ m, RIDGE) for x, m in zip(keys, matrix, strict=True)]
    check(scores, ridged)
    for x, m, ours in zip(keys, matrix, ridged, strict=True):
        exact = leverages(x, 0)
        lengths = np.linalg.svd((x - x.mean(0)) @ m)[1][: x.shape[1]]
        loss = RIDGE / (RIDGE + lengths[-1] ** 2)
        assert loss < 0.02
        assert (ours <= exact + EXACT).all() and (ours >= (1 - loss) * exact - EXACT).all()


@pytest.mark.parametrize("size", [3, 8, 48])
def test_scores_are_leverages_of_projected_keys_before_rope(size):
    model, ids = tiny(), tokens(40)
    pressed(model, Recording(0.5, sketch_dimension=size), ids)
    for layer, keys in enumerate(bare_keys(tiny(), ids)):
        view, scores = SEEN[layer]
        matrix = gaussian(view, 8, size, 0).double().numpy()
        check(scores[0], [leverages(keys[:, h] @ matrix[h], RIDGE) for h in range(2)])


def test_a_projection_that_loses_nothing_gives_exact_leverage():
    """With as many channels as the keys have, any projection leaves the hat matrix as it is."""
    model, ids = tiny(), tokens(40)
    pressed(model, Recording(0.5, sketch_dimension=200), ids)
    for layer, keys in enumerate(bare_keys(tiny(), ids)):
        view, scores = SEEN[layer]
        matrix = gaussian(view, 8, 200, 0).double().numpy()
        check_exact(scores[0], keys.transpose(1, 0, 2), matrix)


def test_a_model_without_rope_is_scored_by_its_keys():
    pressed(tiny("gpt2"), Recording(0.5, sketch_dimension=64), tokens(40))
    view, scores = SEEN[1]
    check_exact(scores[0], view.keys[0].numpy(), gaussian(view, 8, 64, 0).double().numpy())


def test_rotated_keys_of_a_further_turn_are_rotated_back():
    """Compacted keys stand at other positions, and score as keys that were left where they were."""
    ids, scores = tokens(40), []
    for wrap in (cp.KeyRerotationPress, lambda press: press):
        model, press = tiny(), wrap(Recording(0.5))
        cache = pressed(model, press, ids[:, :23])
        with press(model):
            forward(model, cache, input_ids=ids[:, 23:])
        assert SEEN[0][0].valid.shape[-1] == 11 + 17
        scores.append(SEEN[0][1])
    close(*scores)


def test_projections_repeat_and_differ_by_layer_head_and_seed():
    model, ids = tiny(), tokens(60)
    first = kept(pressed(model, LeverageScorePress(0.5, sketch_dimension=2), ids))
    assert first == kept(pressed(tiny(), LeverageScorePress(0.5, sketch_dimension=2), ids))
    assert first != kept(pressed(model, LeverageScorePress(0.5, sketch_dimension=2, seed=1), ids))
    pressed(model, Recording(0.5), tokens(12))
    view = SEEN[0][0]
    drawn = [gaussian(replace(view, layer=n), 8, 48, s) for n in range(3) for s in range(3)]
    every = torch.stack(drawn).flatten(0, 1)  # [layers * seeds * H, 8, 48]
    for i in range(len(every)):
        assert all((every[i] - other).abs().max() > 0.1 for other in every[:i])
    torch.random.manual_seed(3)
    assert torch.equal(gaussian(view, 8, 48, 0), drawn[0])
    lengths = (randn(500, 8) @ every).square().sum(-1).mean()
    # The mean of 500 squared lengths of 8 numbers, through as many matrices of 8 * 48 numbers: a
    # mean is off by more than 5 of its errors once in a million times.
    error = 8 * (2 / 8 / 500 + 2 / (8 * 48) / len(every)) ** 0.5
    assert abs(lengths - 8) < 5 * error
    assert gaussian(view, 8, 48, 10**30).isfinite().all()


def test_drawing_leaves_the_global_generator_alone():
    model = tiny()
    torch.manual_seed(5)
    wanted = rand(3)
    torch.manual_seed(5)
    pressed(model, LeverageScorePress(0.5), tokens(10))
    assert torch.equal(rand(3), wanted)


def test_padding_changes_nothing():
    press, model = Recording(0.5), tiny()
    texts = [tokens(n, seed=n) for n in (33, 21, 3)]
    ids = torch.zeros(3, 33, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[33 - text.shape[1] :] = text[0]
    mask = (ids > 0).long()
    rope = (mask.cumsum(-1) - 1).clamp(min=0)
    pressed(model, press, ids, attention_mask=mask, position_ids=rope)
    batch = dict(SEEN)
    for b, text in enumerate(texts):
        pressed(model, press, text)
        for depth, (_, scores) in SEEN.items():
            ours = batch[depth][1][b, :, 33 - text.shape[1] :]
            close(ours, scores[0])


def test_pairs_that_are_all_alike_have_no_leverage():
    press = Recording(0.5)
    pressed(tiny("gpt2"), press, tokens(12))
    view = SEEN[0][0]
    alike = replace(view, keys=view.keys[:, :, :1].expand_as(view.keys))
    close(press.score(alike), torch.zeros(1, 4, 12, dtype=torch.float64))
    only = view.only(view.index == 3)
    assert torch.equal(press.score(only), torch.zeros(1, 4, 12))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sketch_dimension": 0}, "sketch_dimension: got 0, wanted a whole number of at least 1"),
        ({"sketch_dimension": 4.0}, "sketch_dimension: got 4.0"),
        ({"seed": -1}, "seed: got -1, wanted a whole number of at least 0"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(cp.CachepressError, match=said):
        LeverageScorePress(0.5, **options)
