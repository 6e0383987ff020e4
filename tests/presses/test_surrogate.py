"""Presses that predict scores from hidden states, against models in plain loops; their memory."""

import math
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.ranks import pinned
from tests.bounds import EXACT, close
from tests.learned import learned
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward, kept, pressed

SEEN = []


@dataclass(frozen=True)
class _KVzap(cp.KVzapPress):
    """Records its scores."""

    def score(self, view):
        SEEN.append((view.depth, view.valid, super().score(view)))
        return SEEN[-1][2]


@dataclass(frozen=True)
class _FastKVzip(cp.FastKVzipPress):
    """Records its scores."""

    def score(self, view):
        SEEN.append((view.depth, view.valid, super().score(view)))
        return SEEN[-1][2]


def hidden_states(model, ids):
    """What each layer's attention reads, ``[T, M]``."""
    found = {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda m, a, k: found.__setitem__(m.layer_idx, k["hidden_states"][0]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    forward(model, input_ids=ids)
    for hook in hooks:
        hook.remove()
    return [found[i] for i in range(4)]


def read(path):
    """What was learned, for references in float64."""
    return {name: x.double() for name, x in load_file(path).items()}


def scores_of(press, ids, **inputs):
    SEEN.clear()
    pressed(tiny(), press, ids, **inputs)
    return {depth: scores for depth, _, scores in SEEN}


def gelu(x):
    return x / 2 * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("model_type", ["linear", "mlp"])
def test_kvzap_is_a_map_of_each_pair(model_type):
    ids, folder = tokens(12), learned()
    ours = scores_of(_KVzap(0.5, model_type, surrogate=folder), ids)
    weights = read(f"{folder}/kvzap_{model_type}.safetensors")
    for depth, hidden in enumerate(hidden_states(tiny(), ids)):
        for t, row in enumerate(hidden):
            if model_type == "mlp":
                weight, bias = (weights[f"layers.{depth}.0.{x}"] for x in ("weight", "bias"))
                row = torch.tensor(
                    [gelu(float(w @ row + b)) for w, b in zip(weight, bias, strict=True)],
                    dtype=torch.float64,
                )
            last = f"layers.{depth}." + ("2." if model_type == "mlp" else "")
            for h in range(2):
                wanted = float(weights[last + "weight"][h] @ row + weights[last + "bias"][h])
                assert float(ours[depth][0, h, t]) == pytest.approx(wanted, abs=EXACT, rel=EXACT)


def rms(x, weight):
    return x / math.sqrt(float((x * x).mean()) + 1e-6) * weight


def test_a_gate_is_an_attention_of_one_pair():
    ids, folder = tokens(12), learned()
    ours = scores_of(_FastKVzip(0.5, n_sink=0, window_size=1, gates=folder), ids)
    weights = read(f"{folder}/fastkvzip.safetensors")
    for depth, hidden in enumerate(hidden_states(tiny(), ids)):
        own = {name: x[depth] for name, x in weights.items()}
        d = own["q_norm"].shape[0]
        for t, row in enumerate(hidden[:-1]):
            for h in range(2):
                key = rms(own["k_weight"][h * d : (h + 1) * d] @ row, own["k_norm"])
                shares = []
                for g in range(2):
                    part = slice((2 * h + g) * d, (2 * h + g + 1) * d)
                    query = own["q_weight"][part] @ row + own["q_bias"][part]
                    query = rms(query, own["q_norm"])
                    logit = math.exp(float(query @ key) / math.sqrt(d) + float(own["bias"][h, g]))
                    others = [math.exp(float(query @ k) / math.sqrt(d)) for k in own["base"][h]]
                    shares.append(logit / (logit + sum(others)))
                wanted = sum(shares) / 2
                assert float(ours[depth][0, h, t]) == pytest.approx(wanted, abs=EXACT, rel=EXACT)


@pytest.mark.parametrize(("n", "ratio", "rows"), [(50, 0.02, 1), (41, 0.1, 4), (100, 0.29, 29)])
def test_the_window_of_a_short_text_is_an_exact_part_of_it(n, ratio, rows):
    press = _FastKVzip(0.5, n_sink=2, window_ratio=ratio, gates=learned())
    ours = scores_of(press, tokens(n))
    wanted = [t < 2 or t >= n - rows for t in range(n)]
    for depth in range(4):
        assert pinned(ours[depth])[0].tolist() == [wanted, wanted]


def test_heads_and_layers_compete_unless_layers_are_alone():
    for layerwise in (False, True):
        cache = pressed(tiny(), cp.FastKVzipPress(0.5, layerwise, gates=learned()), tokens(40))
        rows = torch.stack([store.lengths.sum() for store in compressed_layers(cache)])
        assert rows.sum() == 160
        assert ((rows == 40).all()) == layerwise


def test_a_sequence_of_a_padded_batch_is_predicted_as_if_alone():
    """Words that come again have equal predictions in the first layer: ties."""
    texts = [tokens(n, seed=n) % 12 + 3 for n in (31, 17, 4)]
    ids = torch.zeros(3, 31, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[31 - text.shape[1] :] = text[0]
    mask = (ids > 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for press in (
        cp.KVzapPress(0.5, surrogate=learned()),
        cp.KVzapPress(0.5, "linear", surrogate=learned()),
        cp.FastKVzipPress(0.5, gates=learned()),
    ):
        batch = pressed(tiny(), press, ids, attention_mask=mask, position_ids=positions)
        for i, text in enumerate(texts):
            pad = 31 - text.shape[1]
            for layer, alone in zip(kept(batch), kept(pressed(tiny(), press, text)), strict=True):
                assert [[p - pad for p in head] for head in layer[i]] == alone[0]


def test_pairs_keep_their_prediction_in_a_second_turn():
    model, ids, press = tiny(), tokens(40), _KVzap(0.5, surrogate=learned())
    cache = DynamicCache()
    SEEN.clear()
    with press(model):
        forward(model, cache, input_ids=ids[:, :24])
        first, rows = SEEN[0][2][0, 0], kept(cache)[0][0][0]
        forward(model, cache, input_ids=ids[:, 24:])
    close(SEEN[4][2][0, 0, :12], first[rows])


def test_tokens_that_were_decoded_unobserved_count_as_average():
    model, press = tiny(), _KVzap(0.5, surrogate=learned())
    cache = DynamicCache()
    with press(model):
        forward(model, cache, input_ids=tokens(20))
        for step in range(5):
            forward(model, cache, input_ids=tokens(1, seed=step))
        SEEN.clear()
        forward(model, cache, input_ids=tokens(7))
    for _, valid, scores in SEEN:
        assert valid.all() and scores.isfinite().all()
        known = torch.cat([scores[..., :10], scores[..., 15:]], dim=-1)
        wanted = known.mean(-1, keepdim=True).expand(-1, -1, 5)
        close(scores[..., 10:15], wanted)


def test_what_was_observed_outlives_the_with_block():
    """Two blocks that decode are as one."""
    press = cp.DecodingPress(_KVzap(surrogate=learned()), 8, 12)
    ends = []
    for blocks in ([10], [5, 5]):
        model, cache = tiny(), DynamicCache()
        with press(model):
            forward(model, cache, input_ids=tokens(20))
        SEEN.clear()
        for block in blocks:
            with press(model):
                for _ in range(block):
                    forward(model, cache, input_ids=tokens(1, seed=cache.get_seq_length()))
        ends.append((kept(cache), [scores for _, _, scores in SEEN]))
    assert ends[0][0] == ends[1][0]
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.equal(one, other)
