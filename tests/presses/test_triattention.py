"""TriAttention against its series, written out in complex numbers before RoPE."""

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.presses.triattention import TriAttentionPress
from cachepress.ranks import pinned
from tests.bounds import close
from tests.presses.test_snapkv import (
    assert_each_text_is_as_if_alone,
    assert_second_turns_are_as_if_alone,
    recording,
)
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward, kept, pressed

PRESS = TriAttentionPress(0.5, window_size=4, n_sink=2, max_distance=16)
D = 8


def scaled(kind):
    """The tiny Llama with another rotary embedding."""
    source = tiny()
    config = type(source.config).from_dict(source.config.to_dict())
    config.rope_parameters = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model = type(source)(config)
    model.load_state_dict(source.state_dict())
    return model.double().eval()


def record(model, name):
    """Queries and keys of each layer before RoPE, ``[T, heads, D]``, filled by the next forward."""
    found = {"q": [], "k": []}
    for layer in model.model.layers:
        for which in found:
            part = getattr(layer.self_attn, which + ("_norm" if name == "qwen3" else "_proj"))

            def note(_, inputs, output, which=which):
                found[which].append(output.detach().double().view(output.shape[1], -1, D))

            part.register_forward_hook(note)
    return found


def bands(x, rotary, neighbours):
    """Complex numbers of the bands that turn, and the channels that do not."""
    x, rest = x[..., :rotary], x[..., rotary:]
    if neighbours:
        return torch.complex(x[..., 0::2], x[..., 1::2]), rest
    return torch.complex(x[..., : rotary // 2], x[..., rotary // 2 :]), rest


def series(query, keys, omega, neighbours, n_sink, distances):
    """Scores ``[T]`` of the keys ``[T, D]`` by the queries ``[T, D]`` of one head."""
    t = len(keys)
    query, still = bands(query[n_sink:], 2 * len(omega), neighbours)
    keys, still_keys = bands(keys, 2 * len(omega), neighbours)
    centre, result = query.mean(0), torch.zeros(t, dtype=torch.double)
    for i in range(t):
        for ahead in distances:
            phase = (centre * keys[i].conj()).angle()
            turned = torch.cos(omega * (t - 1 - i + ahead) + phase)
            result[i] += (centre.abs() * keys[i].abs() * turned).sum() / len(distances)
        norm = query.abs().square().mean(0).sqrt()
        concentration = centre.abs() / norm
        result[i] += ((1 - concentration) * norm * keys[i].abs()).sum()
        mean, size = still.mean(0), still.square().mean(0).sqrt()
        result[i] += mean @ still_keys[i] + (size - mean.abs()) @ still_keys[i].abs()
    return result


def transcription(query, keys, omega, neighbours, press):
    """Scores ``[H, T]``: each query head in deviations, the highest of a group."""
    distances = [2**i for i in range(20) if 2**i <= press.max_distance]
    t, heads, h = len(keys), query.shape[1], keys.shape[1]
    free = slice(press.n_sink, t - press.window_size)
    result = torch.full((h, t), float("-inf"), dtype=torch.double)
    for k in range(heads):
        own = keys[:, k * h // heads]
        score = series(query[:, k], own, omega, neighbours, press.n_sink, distances)
        mean, deviation = score[free].mean(), score[free].std(correction=0)
        head = result[k * h // heads]
        torch.maximum(head, (score - mean) / deviation, out=head)
    return result


def frequencies(rotary, theta=10000.0):
    return theta ** -(torch.arange(0, rotary, 2, dtype=torch.double) / rotary)


@pytest.mark.parametrize(
    ("name", "rotary", "neighbours"),
    [("llama", 8, False), ("qwen3", 8, False), ("glm4", 4, True)],
)
@pytest.mark.parametrize("most", [1, 20, 65536])
def test_score_is_the_series(name, rotary, neighbours, most):
    model = tiny(name)
    found = record(model, name)
    options = {"window_size": 4, "n_sink": 2, "max_distance": most}
    press, seen = recording(TriAttentionPress(0.5, **options))
    pressed(model, press, tokens(24))
    for depth, [(_, score)] in seen.items():
        query, keys = found["q"][depth], found["k"][depth]
        wanted = transcription(query, keys, frequencies(rotary), neighbours, press)
        wanted = wanted[:, 2:-4]
        close(score[0, :, 2:-4], wanted)
        assert pinned(score)[..., -4:].all() and pinned(score)[..., :2].all()
        assert not pinned(score)[..., 2:-4].any()


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_other_rotary_embeddings_are_read_off_and_left_as_they_were(kind):
    model = scaled(kind)
    found = record(model, "llama")
    pressed(model, TriAttentionPress(0.5, window_size=4), tokens(24))
    found["q"].clear(), found["k"].clear()
    press, seen = recording(PRESS)
    pressed(model, press, tokens(24))
    after = model.model.rotary_emb.inv_freq.clone()
    again = scaled(kind)
    forward(again, input_ids=tokens(24))
    assert torch.equal(after, again.model.rotary_emb.inv_freq)
    for depth, [(_, score)] in seen.items():
        query, keys = found["q"][depth], found["k"][depth]
        wanted = transcription(query, keys, after.double(), False, press)[:, 2:-4]
        close(score[0, :, 2:-4], wanted)


def test_a_layer_without_rotary_is_scored_by_the_mean_query():
    press, seen = recording(PRESS)
    pressed(tiny("gpt2"), press, tokens(24))
    for [(view, score)] in seen.values():
        for h in range(4):
            mean = view.moments.mean[0, h, 0].double()
            size = (mean.square() + view.moments.covariance[0, h, 0].diagonal()).sqrt()
            keys = view.keys[0, h].double()
            logits = keys @ mean + keys.abs() @ (size - mean.abs())
            free = logits[2:-4]
            wanted = (free - free.mean()) / free.std(correction=0)
            close(score[0, h, 2:-4], wanted)


def test_pairs_of_an_earlier_turn_keep_their_distance():
    """A second turn scores old keys from where they are, by the queries of this turn."""
    model, ids = tiny(), tokens(40)
    found = record(model, "llama")
    press, seen = recording(PRESS)
    cache = DynamicCache()
    with press(model):
        forward(model, cache, input_ids=ids[:, :24])
        forward(model, cache, input_ids=ids[:, 24:])
    for depth, [_, (view, score)] in seen.items():
        keys = torch.cat([found["k"][depth], found["k"][4 + depth]])
        step = found["q"][4 + depth]
        distances, h = [1, 2, 4, 8, 16], 0
        assert view.keys.shape[2] == 28
        heads = []
        for k in range(2):
            query = step[:, h * 2 + k]
            every = series_of_turn(query, keys[:, h], distances)
            own = every[view.index[0, h].long()]
            free = own[2:-4]
            heads.append((free - free.mean()) / free.std(correction=0))
        wanted = torch.stack(heads).amax(0)
        close(score[0, h, 2:-4], wanted)


def series_of_turn(query, keys, distances):
    """The series for a turn whose queries are fewer than the keys; none of them is a sink's."""
    padded = torch.cat([query.new_zeros(len(keys) - len(query), D), query])
    none = len(keys) - len(query)
    return series(padded, keys, frequencies(8), False, none, distances)


def test_decoding_keeps_the_target():
    model, ids = tiny(), tokens(40)
    cache = DynamicCache()
    with cp.DecodingPress(PRESS, compression_interval=8, target_size=12)(model):
        forward(model, cache, input_ids=ids[:, :16])
        for step in range(16, 40):
            forward(model, cache, input_ids=ids[:, step : step + 1])
    for layer in kept(cache):
        for head in layer[0]:
            assert len(head) == 12 and head[:2] == [0, 1] and head[-4:] == [36, 37, 38, 39]


def test_padding_and_short_texts_change_nothing():
    assert_each_text_is_as_if_alone(PRESS)
    assert_each_text_is_as_if_alone(TriAttentionPress(0.5))
    assert_each_text_is_as_if_alone(PRESS, model=tiny("glm4"))


def test_turns_of_different_lengths_change_nothing():
    assert_second_turns_are_as_if_alone(PRESS)


def test_a_text_within_the_pins_has_finite_scores():
    for n in (2, 5):
        press, seen = recording(PRESS)
        cache = pressed(tiny(), press, tokens(n))
        assert all(score.isfinite().all() for [(_, score)] in seen.values())
        assert len(kept(cache)[0][0][0]) == n // 2


def test_bf16_is_scored_in_float32():
    press, seen = recording(PRESS)
    pressed(tiny().bfloat16(), press, tokens(24))
    assert all(score.dtype == torch.float32 for [(_, score)] in seen.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": -1}, "window_size: got -1, wanted a whole number of at least 0"),
        ({"n_sink": 0.5}, "n_sink: got 0.5, wanted a whole number of at least 0"),
        ({"max_distance": 0}, "max_distance: got 0, wanted a whole number of at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(cp.CachepressError, match=message):
        TriAttentionPress(0.5, **options)
