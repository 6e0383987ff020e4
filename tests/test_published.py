"""Artefacts as their authors publish them, against the arithmetic of their papers, and odd files.

Every file is written here from the published layout: names, shapes, and the way round.
"""

import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

import cachepress as cp
from cachepress.artefacts.kept import save_artefact
from cachepress.artefacts.published import LAYOUTS
from cachepress.artefacts.reading import load_artefact
from tests.bounds import EXACT, close
from tests.published import (
    D,
    G,
    H,
    L,
    T,
    drawn,
    gates_as_published,
    good,
    published_curve,
    published_kvzap,
    published_q_filters,
    published_stats,
    save_gates,
)
from tests.tiny import exact_tiny as tiny
from tests.tiny_cache import forward, kept, pressed


def words() -> Tensor:
    """Token ids ``[1, T]`` that all differ, so that no two pairs of a layer are alike."""
    return 3 + torch.randperm(93, generator=torch.Generator().manual_seed(5))[None, :T]


def states_of(model, ids):
    """Keys and values ``[L, H, T, D]`` and the hidden states that attention read ``[L, T, M]``."""
    cache, hidden, hooks = DynamicCache(), [], []
    for layer in model.model.layers:
        hooks.append(
            layer.self_attn.register_forward_pre_hook(
                lambda _, __, kwargs: hidden.append(kwargs["hidden_states"][0]), with_kwargs=True
            )
        )
    forward(model, cache, input_ids=ids)
    for hook in hooks:
        hook.remove()
    keys = [layer.keys[0].double() for layer in cache.layers]
    values = [layer.values[0].double() for layer in cache.layers]
    return keys, values, [x.double() for x in hidden]


def best(scores, n: int) -> list[int]:
    """The places of the ``n`` highest scores, which must lead by more than rounding."""
    order = sorted(range(len(scores)), key=lambda t: float(scores[t]), reverse=True)
    lead = float(scores[order[n - 1]]) - float(scores[order[n]])
    assert lead > EXACT * abs(float(scores[order[n]]))
    return sorted(order[:n])


@pytest.mark.parametrize("binary", [False, True])
def test_q_filters_are_published_against_the_queries(tmp_path, binary):
    filters, ids = published_q_filters(tmp_path, binary), words()
    keys, _, _ = states_of(tiny(), ids)
    held = kept(pressed(tiny(), cp.QFilterPress(0.6, filters=str(tmp_path)), ids))
    for layer in range(L):
        for h in range(H):
            scores = [
                -sum(f * k for f, k in zip(filters[layer, h].tolist(), key, strict=True))
                for key in keys[layer][h].tolist()
            ]
            assert held[layer][0][h] == best(scores, 24)


def average_rotation(model, positions) -> Tensor:
    """The mean matrix that turns a query to each of the positions."""
    total = torch.zeros(D, D, dtype=torch.double)
    for position in positions:
        for i in range(D // 2):
            angle = position * float(model.model.rotary_emb.inv_freq[i])
            j = i + D // 2
            total[i, i] += math.cos(angle)
            total[j, j] += math.cos(angle)
            total[i, j] -= math.sin(angle)
            total[j, i] += math.sin(angle)
    return total / len(positions)


def test_statistics_of_queries_are_published_by_query_head(tmp_path):
    (mean, covariance), ids, n_sink = published_stats(tmp_path), words(), 4
    model = tiny()
    keys, values, _ = states_of(model, ids)
    rotation = average_rotation(model, range(T, T + 512))
    press = cp.ExpectedAttentionStatsPress(0.5, stats=str(tmp_path))
    held = kept(pressed(model, press, ids))
    for layer in range(L):
        for h in range(H):
            shares = torch.zeros(T - n_sink, dtype=torch.double)
            for head in range(h * G, (h + 1) * G):
                mu = rotation @ mean[layer, head]
                sigma = rotation @ covariance[layer, head] @ rotation.T
                logits = [
                    float(mu @ key / D**0.5 + key @ sigma @ key / D / 2)
                    for key in keys[layer][h][n_sink:]
                ]
                shares += torch.tensor(logits).double().softmax(0) / G
            scores = shares * values[layer][h][n_sink:].norm(dim=-1)
            wanted = [*range(n_sink), *(n_sink + t for t in best(scores, T // 2 - n_sink))]
            assert held[layer][0][h] == wanted


def naive_gate(gate, hidden: Tensor) -> list[list[float]]:
    """What a gate says of each token, by KV head."""
    gate = {name: x.double() for name, x in gate.items()}
    d = len(gate["q_norm.weight"])

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * weight

    found = []
    for h in range(H):
        row = []
        for x in hidden:
            key = gate["k_proj.weight"][h * d : (h + 1) * d] @ x
            key, total = normed(key, gate["k_norm.weight"]), 0.0
            for g in range(G):
                own = slice((h * G + g) * d, (h * G + g + 1) * d)
                query = gate["q_proj.weight"][own] @ x + gate["q_proj.bias"][own]
                query = normed(query, gate["q_norm.weight"])
                logit = float(query @ key) / d**0.5 + float(gate["b"][h, 0, g])
                others = [float(query @ base) / d**0.5 for base in gate["k_base"][h, 0]]
                total += 1 / (1 + sum(math.exp(other - logit) for other in others))
            row.append(total / G)
        found.append(row)
    return found


@pytest.mark.parametrize("place", ["q2_dim4_sink3.pt", "x.bin", "other/q2_dim16_sink16.pt"])
def test_gates_are_published_with_the_losses_of_their_training(tmp_path, place):
    gates, ids, n_sink = gates_as_published(), words(), 4
    (tmp_path / place).parent.mkdir(exist_ok=True)
    save_gates(tmp_path / place, gates)
    model = tiny()
    model.config.name_or_path = "some/Other"
    _, _, hidden = states_of(model, ids)
    press = cp.FastKVzipPress(0.5, layerwise=True, gates=str(tmp_path))
    held = kept(pressed(model, press, ids))
    for layer in range(L):
        scores = naive_gate(gates[layer], hidden[layer])
        for row in scores:
            row[:n_sink], row[-1:] = [2.0] * n_sink, [2.0]
        flat = torch.tensor([s for row in scores for s in row])
        chosen = best(flat, H * T // 2)
        for h in range(H):
            assert held[layer][0][h] == [x - h * T for x in chosen if x // T == h]


@pytest.mark.parametrize("model_type", ["linear", "mlp"])
def test_surrogates_of_kvzap_are_published_by_layer(tmp_path, model_type):
    found, ids = published_kvzap(tmp_path, model_type), words()
    _, _, hidden = states_of(tiny(), ids)
    press = cp.KVzapPress(0.5, model_type, surrogate=str(tmp_path))
    held = kept(pressed(tiny(), press, ids))

    def linear(name: str, x: Tensor) -> Tensor:
        return found[f"{name}.weight"].double() @ x + found[f"{name}.bias"].double()

    for i in range(L):
        rows = []
        for x in hidden[i]:
            if model_type == "mlp":
                x = linear(f"layers.{i}.0", x)
                x = torch.tensor([v / 2 * (1 + math.erf(v / 2**0.5)) for v in x.tolist()]).double()
                rows.append(linear(f"layers.{i}.2", x))
            else:
                rows.append(linear(f"layers.{i}", x))
        for h in range(H):
            assert held[i][0][h] == best([row[h] for row in rows], T // 2)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_curves_of_lukv_are_published_as_what_heads_evict(tmp_path, ratio):
    drop, ids = published_curve(tmp_path), words()
    keys, _, _ = states_of(tiny(), ids)
    press = cp.LUKVPress(cp.KnormPress(ratio), curve=str(tmp_path))
    held = kept(pressed(tiny(), press, ids))
    for layer in range(L):
        rates = 1 - drop[round(100 * ratio) - 1, layer]
        for h in range(H):
            scores = -keys[layer][h].norm(dim=-1)
            scores[:4], scores[-1:] = 1.0, 1.0
            assert held[layer][0][h] == best(scores, round(T * rates[h]))


def test_all_layers_of_a_hybrid_model_are_published_and_its_full_ones_used(tmp_path):
    """Every other layer of this Gemma slides, so that layers 1 and 3 are compressed."""
    model, ids = tiny("gemma3"), words()
    short = tmp_path / "short.safetensors"
    for press, kind, option in (
        (cp.QFilterPress(0.5), "q_filters", "filters"),
        (cp.ExpectedAttentionStatsPress(0.5), "query_stats", "stats"),
        (cp.FastKVzipPress(0.5), "fastkvzip", "gates"),
        (cp.KVzapPress(0.5), "kvzap_mlp", "surrogate"),
        (cp.LUKVPress(cp.KnormPress(0.5)), "lukv", "curve"),
    ):
        (tmp_path / kind).mkdir()
        ready = replaced(press, option, str(good(kind, tmp_path / kind))).for_model(model)
        assert ready.layers == (1, 3)
        assert cp.parse(repr(ready)) == ready
        tensors = load_artefact(getattr(ready, option), kind, layers=(1, 3))
        save_artefact(short, kind, tensors, {})
        other = replaced(press, option, str(short))
        assert other.for_model(model).layers is None
        assert kept(pressed(model, ready, ids)) == kept(pressed(model, other, ids))


def replaced(press, option, value):
    return type(press)(**{**vars(press), option: value})


PRESSES = {
    "q_filters": lambda path: cp.QFilterPress(0.5, filters=path),
    "query_stats": lambda path: cp.ExpectedAttentionStatsPress(0.5, stats=path),
    "fastkvzip": lambda path: cp.FastKVzipPress(0.5, gates=path),
    "kvzap_linear": lambda path: cp.KVzapPress(0.5, "linear", surrogate=path),
    "kvzap_mlp": lambda path: cp.KVzapPress(0.5, surrogate=path),
    "lukv": lambda path: cp.LUKVPress(cp.KnormPress(0.5), curve=path),
}


def refusal(kind: str, path: object) -> str:
    with pytest.raises(cp.CachepressError) as error:
        PRESSES[kind](str(path)).for_model(tiny())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", PRESSES)
def test_another_models_artefact_is_refused_and_so_is_damage(kind, tmp_path):
    for name in ("more", "right"):
        (tmp_path / name).mkdir()
    path = good(kind, tmp_path / "more", L + 1)
    assert "it is about 5 layers, wanted 4" in refusal(kind, path)
    path = good(kind, tmp_path / "right")
    ready = PRESSES[kind](str(path)).for_model(tiny())
    assert str(path) in repr(ready)
    if kind != "query_stats":  # Which are by query head, and gpt2 has as many of these.
        with pytest.raises(cp.CachepressError, match="does not fit the model: .* wanted"):
            PRESSES[kind](str(path)).for_model(tiny("gpt2"))
    whole = path.read_bytes()
    for size in (0, 1, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "damaged" in refusal(kind, path)
    for text in (b"0.1\t0.9\n", b"[[0.1]]", b"a: 1\n", b"PK\x03\x04", b"\x80\x02.", b"\x93NUMPY"):
        path.write_bytes(text)
        assert "damaged" in refusal(kind, path)


@pytest.mark.parametrize("kind", PRESSES)
def test_the_artefact_of_another_method_is_named(kind, tmp_path):
    for other in PRESSES:
        if other != kind:
            (tmp_path / other).mkdir()
            path = good(other, tmp_path / other)
            assert f"holds {other}, wanted {kind}" in refusal(kind, path)
    save_file({"model.norm.weight": drawn(4)}, tmp_path / "weights.safetensors")
    message = refusal(kind, tmp_path / "weights.safetensors")
    assert f"is no {kind} artefact: it holds model.norm.weight" in message
    assert LAYOUTS[kind] in message


ODD: list[object] = [
    {},
    [],
    [{}],
    3,
    "text",
    {"q_filters": 1},
    {"q_filters": torch.zeros(4, 2, 8, dtype=torch.int32)},
    {"q_filters": torch.zeros(4, 2, 8).to_sparse()},
    {"q_filters": torch.zeros(4, 2, 8, dtype=torch.complex64)},
    {"module": [{"q_proj.weight": torch.zeros(2, 2)}]},
    {"module": []},
    {"module": "q"},
    {"module": [gates_as_published()[0], gates_as_published(m=5)[0]]},
    torch.zeros(99, 4),
    torch.zeros(()),
    torch.zeros(4, 2, 8),
]


@pytest.mark.parametrize("kind", PRESSES)
def test_whatever_else_torch_saved_is_refused(kind, tmp_path):
    path = tmp_path / "x.pt"
    for content in ODD:
        torch.save(content, path)
        message = refusal(kind, path)
        assert f"{path} is no {kind} artefact: it holds " in message and LAYOUTS[kind] in message


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", PRESSES)
def test_numbers_that_are_not_finite_are_refused(kind, bad, tmp_path):
    path = good(kind, tmp_path)
    if kind == "lukv":
        curve = np.load(path)
        curve[3, 1, 1] = bad
        np.save(path, curve)
    else:
        gates = gates_as_published()
        gates[1]["b"][0] = bad
        tensors = load_artefact(str(path), kind)
        next(iter(tensors.values()))[-1] = bad
        torch.save({"module": gates} if kind == "fastkvzip" else tensors, path)
    assert "not finite" in refusal(kind, path)


def test_odd_arrays_are_refused(tmp_path):
    path = tmp_path / "x.npy"
    for array in (
        np.array(["text"]),
        np.array([{"a": 1}], dtype=object),
        np.zeros((99, 4, 2), dtype=complex),
        np.zeros((99, 4, 2), dtype="M8[s]"),
        np.zeros((99, 4, 3)),
        np.zeros((98, 4, 2)),
        np.full((99, 4, 2), 37.0),
        np.zeros(()),
    ):
        np.save(path, array, allow_pickle=True)
        assert str(path) in refusal("lukv", path)
    np.savez(tmp_path / "x.npz", np.zeros((99, 4, 2)))
    (tmp_path / "x.npz").rename(path)
    assert str(path) in refusal("lukv", path)
    huge = path.with_name("huge.npy")
    np.save(huge, np.zeros((99, 4, 2)))
    data = huge.read_bytes().replace(b"(99, 4, 2), }", b"(999999999999999, 4, 2), }")
    huge.write_bytes(data)
    assert str(huge) in refusal("lukv", huge)


@pytest.mark.parametrize(("low", "high"), [(-0.5, 3.0), (-2.0, 0.25), (0.0, 1.5)])
@pytest.mark.parametrize("rises", [True, False])
def test_the_numbers_of_a_curve_are_named_as_they_stand_in_the_file(tmp_path, low, high, rises):
    curve = published_curve(tmp_path)
    curve = curve if rises else 1 - curve
    curve[40, 1, 0], curve[41, 2, 1] = low, high
    np.save(tmp_path / "ea_avg_ratio.npy", curve)
    # What the file holds else lies within 0.01 and 0.99.
    low, high = min(low, curve.min()), max(high, curve.max())
    said = refusal("lukv", tmp_path / "ea_avg_ratio.npy")
    assert said.endswith(f"holds numbers from {low:g} to {high:g}, wanted fractions from 0 to 1")


def test_arrays_of_another_byte_order_or_width_are_read(tmp_path):
    drop = published_curve(tmp_path)
    for dtype in (">f8", "<f4", "f2"):
        np.save(tmp_path / "ea_avg_ratio.npy", drop.astype(dtype))
        found = load_artefact(str(tmp_path / "ea_avg_ratio.npy"), "lukv")["lukv"]
        kept = np.float64(1) - drop.astype(dtype).astype(np.float64)
        close(found.double(), kept)


class Bomb:
    """What writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


class Call(Bomb):
    def __reduce__(self):
        return (exec, (f"open({str(self.mark)!r}, 'w')",))


class System(Bomb):
    def __reduce__(self):
        import os

        return (os.system, (f"touch {self.mark}",))


@pytest.mark.parametrize("bomb", [Bomb, Call, System])
@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.bin", "model.safetensors", "x.npy"])
def test_no_code_in_a_file_ever_runs(tmp_path, bomb, name):
    mark, path = tmp_path / "ran", tmp_path / name
    for content in (bomb(mark), {"module": [{"b": bomb(mark)}]}, [torch.zeros(2), bomb(mark)]):
        torch.save(content, path)
        assert "is refused: reading it would run" in refusal("fastkvzip", path)
        torch.save(content, path, _use_new_zipfile_serialization=False)
        refusal("fastkvzip", path)
        path.write_bytes(pickle.dumps(content))
        refusal("fastkvzip", path)
        path.write_bytes(pickle.dumps(content, protocol=2))
        refusal("fastkvzip", path)
    np.save(tmp_path / "array.npy", np.array([bomb(mark)], dtype=object), allow_pickle=True)
    refusal("lukv", tmp_path / "array.npy")
    assert not mark.exists()
    pickle.loads(pickle.dumps(bomb(mark)))
    assert mark.exists()


def test_code_is_not_smuggled_in_beside_the_arrays_of_a_trainer(tmp_path):
    """An array of objects among the losses that the trainer recorded."""
    mark, path = tmp_path / "ran", tmp_path / "x.pt"
    beside = np.array([Call(mark)], dtype=object)
    torch.save({"module": gates_as_published(), "loss": beside}, path)
    assert "would run" in refusal("fastkvzip", path)
    assert not mark.exists()


def test_what_is_read_no_further_is_said_in_a_sentence(tmp_path):
    path = tmp_path / "x.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    message = refusal("q_filters", path)
    assert "TorchScript" in message and "weights_only=False" not in message
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    assert refusal("q_filters", path) == (
        f"{path} only points to a file of Git LFS: get that, git lfs pull"
    )


def test_a_zip_that_is_no_file_of_torch_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "text")
    assert "damaged" in refusal("q_filters", path)


def test_of_several_files_one_has_to_be_named(tmp_path):
    for name in ("a.pt", "b.pt"):
        save_gates(tmp_path / name, gates_as_published())
    assert f"has several files that may be the fastkvzip: name one, such as {tmp_path}" in refusal(
        "fastkvzip", tmp_path
    )


def test_the_published_place_is_named_where_nothing_was_learned(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHEPRESS_HOME", str(tmp_path))
    model = tiny()
    model.config.name_or_path = "meta-llama/Llama-3.1-8B-Instruct"
    for press, place in (
        (cp.QFilterPress(0.5), "nthngdy/Llama-3.1-8B-Instruct_qfilt"),
        (cp.KVzapPress(0.5), "nvidia/KVzap-mlp-Llama-3.1-8B-Instruct"),
        (cp.FastKVzipPress(0.5), "Jang-Hyun/Fast-KVzip"),
        (
            cp.ExpectedAttentionStatsPress(0.5),
            "exp_att_stats_meta-llama_Llama-3.1-8B-Instruct_kmfoda_booksum_100_1000_4",
        ),
    ):
        with pytest.raises(cp.CachepressError, match=f"or name a published one, such as .*{place}"):
            press.for_model(model)


def test_a_source_may_hold_the_name_of_the_model(tmp_path):
    model = tiny()
    model.config.name_or_path = "some-org/Some-Model"
    folder = tmp_path / "exp_att_stats_some-org_Some-Model_x"
    folder.mkdir()
    published_stats(folder)
    press = cp.ExpectedAttentionStatsPress(0.5, stats=f"{tmp_path}/exp_att_stats_{{model}}_x")
    assert press.for_model(model).stats == str(folder / "model.safetensors")
    assert [*press.files("some-org/Some-Model").values()] == [[folder / "model.safetensors"]]
