"""KVzap against its surrogate written out, token by token."""

from math import erf

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache

import cachepress as cp
from cachepress.artefacts.kept import save_artefact
from cachepress.presses.kvzap import KVzapPress
from tests.bounds import close, near
from tests.presses.test_snapkv import (
    assert_each_text_is_as_if_alone,
    assert_second_turns_are_as_if_alone,
    recording,
)
from tests.tiny import exact_tiny as tiny
from tests.tiny import randn, tokens
from tests.tiny_cache import forward, kept, pressed

TYPES = ["linear", "mlp"]


def learned(model_type):
    generator = torch.Generator().manual_seed(4)
    shapes = {"weight": (2, 32), "bias": (2,)}
    if model_type == "mlp":
        shapes = {"0.weight": (5, 32), "0.bias": (5,), "2.weight": (2, 5), "2.bias": (2,)}
    return {
        f"layers.{i}.{name}": torch.randn(shape, generator=generator) / 3
        for i in range(4)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kvzap")
    for model_type in TYPES:
        kind = f"kvzap_{model_type}"
        save_artefact(folder / f"{kind}.safetensors", kind, learned(model_type), {})
    return str(folder)


def linear(x, weights, name):
    pairs = zip(weights[f"{name}.weight"].tolist(), weights[f"{name}.bias"].tolist(), strict=True)
    return [sum(a * b for a, b in zip(row, x, strict=True)) + bias for row, bias in pairs]


def transcription(model_type, depth, hidden):
    """The prediction of each head for one hidden state, a list of floats."""
    weights = learned(model_type)
    if model_type == "linear":
        return linear(hidden, weights, f"layers.{depth}")
    middle = [x * (1 + erf(x / 2**0.5)) / 2 for x in linear(hidden, weights, f"layers.{depth}.0")]
    return linear(middle, weights, f"layers.{depth}.2")


def hidden_states_of(model):
    """What the attention of each layer reads in all forwards to come, ``[n, M]`` by layer."""
    found = {}

    def note(module, args, kwargs):
        states = found.setdefault(module.layer_idx, [])
        states += kwargs["hidden_states"][0].detach().tolist()

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    return found


def assert_scores(seen, hidden, plain):
    """Every view's score against a plain function of layer and hidden state."""
    for depth in range(4):
        wanted = [plain(depth, state) for state in hidden[depth]]
        wanted = torch.tensor(wanted, dtype=torch.float64)
        for view, score in seen[depth]:
            for h in range(2):
                rows = view.positions[0, h].tolist()
                close(score[0, h], wanted[rows, h])


@pytest.mark.parametrize("model_type", TYPES)
def test_scores_are_those_of_the_surrogate_and_the_best_pairs_stay(folder, model_type):
    model = tiny()
    hidden = hidden_states_of(model)
    press, seen = recording(KVzapPress(0.5, model_type, surrogate=folder))
    held = kept(pressed(model, press, tokens(30)))
    assert_scores(seen, hidden, lambda depth, state: transcription(model_type, depth, state))
    for depth in range(4):
        [(_, score)] = seen[depth]
        for h in range(2):
            best = sorted(range(30), key=lambda t, s=score[0, h]: (s[t], t), reverse=True)[:15]
            assert held[depth][0][h] == sorted(best)


@pytest.mark.parametrize("mode", ["exact", "online"])
def test_chunks_score_their_pairs_when_they_are_read(folder, mode):
    model = tiny()
    hidden = hidden_states_of(model)
    press, seen = recording(KVzapPress(0.5, surrogate=folder))
    cache = cp.prefill(model, tokens(30), press, chunk_size=11, mode=mode)
    assert_scores(seen, hidden, lambda depth, state: transcription("mlp", depth, state))
    assert len(seen[0]) == (1 if mode == "exact" else 3)
    if mode == "exact":
        assert kept(cache) == kept(cp.prefill(tiny(), tokens(30), press))
    else:
        assert seen[0][2][0].keys.shape[2] == 11 + 8


def test_decoded_pairs_are_scored_and_old_ones_keep_their_scores(folder):
    model, cache = tiny(), DynamicCache()
    hidden = hidden_states_of(model)
    press, seen = recording(KVzapPress(surrogate=folder))
    with cp.DecodingPress(press, 3, 10)(model):
        forward(model, cache, input_ids=tokens(20))
        for i in range(6):
            forward(model, cache, input_ids=tokens(1, seed=i))
    assert_scores(seen, hidden, lambda depth, state: transcription("mlp", depth, state))
    assert [view.keys.shape[2] for view, _ in seen[3]] == [20, 13, 13]
    last = seen[3][2][0].positions
    assert last.max() == 25 and (last < 20).any() and ((last >= 20) & (last < 23)).any()


def test_a_second_turn_keeps_the_scores_of_the_first(folder):
    model, cache = tiny(), DynamicCache()
    hidden = hidden_states_of(model)
    press, seen = recording(KVzapPress(0.5, surrogate=folder))
    with press(model):
        for n in (20, 9):
            forward(model, cache, input_ids=tokens(n, seed=n))
    assert_scores(seen, hidden, lambda depth, state: transcription("mlp", depth, state))
    assert [view.keys.shape[2] for view, _ in seen[0]] == [20, 19]


def test_padding_changes_nothing(folder):
    press = KVzapPress(0.5, surrogate=folder)
    assert_each_text_is_as_if_alone(press)
    assert_second_turns_are_as_if_alone(press)
    assert_each_text_is_as_if_alone(cp.DecodingPress(press, 3, 10))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_published_layout_is_read(tmp_path, metadata, folder):
    save_file(learned("mlp"), tmp_path / "model.safetensors", metadata)
    ours = KVzapPress(0.5, surrogate=str(tmp_path))
    wanted = kept(pressed(tiny(), KVzapPress(0.5, surrogate=folder), tokens(30)))
    assert kept(pressed(tiny(), ours, tokens(30))) == wanted


def test_half_precision_surrogates_are_computed_in_float32(tmp_path):
    halves = {name: x.bfloat16() for name, x in learned("linear").items()}
    path = tmp_path / "kvzap_linear.safetensors"
    save_artefact(path, "kvzap_linear", halves, {})
    hidden = randn(1, 3, 32).bfloat16()
    found = KVzapPress(0.5, "linear", surrogate=str(path)).predict(hidden, 2)
    weight, bias = halves["layers.2.weight"].double(), halves["layers.2.bias"].double()
    wanted = hidden.double() @ weight.T + bias
    assert found.dtype == torch.float32 and found.shape == (1, 2, 3)
    near(found, wanted.mT, torch.float32, terms=32 + 1)


def without(name, model_type="mlp"):
    return {k: x for k, x in learned(model_type).items() if k != name}


@pytest.mark.parametrize(
    ("model_type", "tensors", "message"),
    [
        ("mlp", without("layers.3.0.weight"), "layers.3.0.weight is missing, wanted [(]5, 32"),
        ("mlp", without("layers.1.0.bias"), "layers.1.0.bias is missing"),
        ("mlp", without("layers.1.2.bias"), "layers.1.2.bias is missing, wanted [(]2,"),
        ("linear", without("layers.0.bias", "linear"), "layers.0.bias is missing, wanted [(]2,"),
        ("linear", learned("mlp"), "holds kvzap_mlp, wanted kvzap_linear.*model_type 'linear'"),
        ("mlp", learned("linear"), "holds kvzap_linear, wanted kvzap_mlp.*model_type 'mlp'"),
        ("mlp", learned("mlp") | {"layers.2.2.weight": torch.zeros(2, 6)}, "is [(]2, 6[)], wanted"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path, model_type, tensors, message):
    model, calls = tiny(), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with pytest.raises(cp.CachepressError, match=message):
        cp.prefill(model, tokens(9), KVzapPress(0.5, model_type, surrogate=str(path)))
    assert not calls


def test_a_missing_or_other_file_is_refused_before_any_work(folder, tmp_path):
    model, calls = tiny(), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for model_type in TYPES:
        press = KVzapPress(0.5, model_type, surrogate=str(tmp_path))
        with pytest.raises(cp.CachepressError, match=f"cachepress train kvzap_{model_type} --mod"):
            cp.prefill(model, tokens(9), press)
    press = KVzapPress(0.5, surrogate=f"{folder}/kvzap_linear.safetensors")
    with pytest.raises(cp.CachepressError, match="holds kvzap_linear, wanted kvzap_mlp"):
        cp.prefill(model, tokens(9), press)
    assert not calls


def test_the_spelling_and_bad_options(folder):
    press = KVzapPress(0.5, "linear", surrogate=f"{folder}/kvzap_linear.safetensors")
    assert cp.parse(repr(press)) == press == press.for_model(tiny())
    with pytest.raises(cp.CachepressError, match="model_type: got 'deep', wanted"):
        KVzapPress(0.5, "deep")
    with pytest.raises(TypeError, match="not made ready"):
        KVzapPress(0.5).predict(torch.zeros(1, 1, 32), 0)
