"""Q-Filters and query statistics against numpy, from every query of every window."""

import numpy as np
import torch
from safetensors.torch import load_file

import cachepress as cp
from cachepress.train import Training, train
from tests.bounds import close, near
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokenizer, tokens
from tests.tiny_cache import forward

WINDOWS = [tokens(24, seed=seed) for seed in range(3)]
ROWS = 3 * 24
"""Queries that are summed up, in float32 as they are written to the file."""


def learn(kind, folder, name="llama"):
    path = str(folder / f"{kind}.safetensors")
    train(kind, Training(tiny(name), WINDOWS, tokenizer(), quiet=True), path)
    return path


def queries(rotated, name="llama"):
    """Queries of each window and layer in numpy, ``[windows, L, Hq, T, D]``."""
    model, found = tiny(name), []
    for ids in WINDOWS:
        raw = {}
        hooks = [
            layer.self_attn.q_proj.register_forward_hook(
                lambda m, a, out, i=i, raw=raw: raw.__setitem__(i, out[0].view(-1, 4, 8).mT)
            )
            for i, layer in enumerate(model.model.layers)
        ]
        forward(model, input_ids=ids)
        for hook in hooks:
            hook.remove()
        x = torch.stack([raw[i] for i in range(4)]).permute(0, 3, 1, 2)  # [L, Hq, T, D]
        if rotated:
            cos, sin = model.model.rotary_emb(x, torch.arange(24)[None])
            half = torch.cat([-x[..., 4:], x[..., :4]], dim=-1)
            x = x * cos[0] + half * sin[0]
        found.append(x.double().numpy())
    return np.stack(found)


def test_filters_are_the_first_singular_vectors_averaged_over_the_group(tmp_path):
    filters = load_file(learn("q_filters", tmp_path))["filters"]
    every = queries(rotated=True)
    for layer in range(4):
        for head in range(2):
            wanted = np.zeros(8)
            for group in range(2):
                x = np.concatenate(every[:, layer, 2 * head + group])  # [windows * T, D]
                left, _, right = np.linalg.svd(x, full_matrices=False)
                wanted += np.sign(left[:, 0].sum()) * right[0] / 2
            near(filters[layer, head], wanted, torch.float32, terms=8 * ROWS)


def test_keys_that_reach_farthest_along_the_filter_stay(tmp_path):
    path, ids = learn("q_filters", tmp_path), tokens(30, seed=9)
    cache = cp.prefill(tiny(), ids, cp.QFilterPress(0.5, filters=path))
    whole, filters = cp.prefill(tiny(), ids), load_file(path)["filters"].double()
    for layer, store in enumerate(cp.cache.batch.compressed_layers(cache)):
        for head in range(2):
            score = [float(k @ filters[layer, head]) for k in whole.layers[layer].keys[0, head]]
            wanted = sorted(sorted(range(30), key=lambda t: score[t])[15:])
            assert store.positions[0, head].tolist() == wanted


def test_moments_are_those_of_all_queries_but_the_sinks(tmp_path):
    found = load_file(learn("query_stats", tmp_path))
    every = queries(rotated=False)[..., 4:, :]
    for layer in range(4):
        for head in range(4):
            x = np.concatenate(every[:, layer, head])
            mean, covariance = x.mean(0), np.cov(x.T, bias=True)
            near(found["mean"][layer, head // 2, head % 2], mean, torch.float32, terms=ROWS)
            ours = found["covariance"][layer, head // 2, head % 2]
            near(ours, covariance, torch.float32, terms=ROWS)


def test_expected_attention_reads_them_in_place_of_the_prompt(tmp_path):
    """A slow transcription: mean over rotated queries, position by position."""
    path, ids = learn("query_stats", tmp_path), tokens(20, seed=9)
    options = {"n_future_positions": 6, "n_sink": 2, "epsilon": 0.01}
    seen = {}

    class Recording(cp.ExpectedAttentionStatsPress):
        def score(self, view):
            seen[view.depth] = super().score(view)
            return seen[view.depth]

    cp.prefill(tiny(), ids, Recording(0.5, **options, stats=path))
    found, model, whole = load_file(path), tiny(), cp.prefill(tiny(), ids)
    turns = np.zeros((8, 8))
    for position in range(20, 26):
        cos, sin = model.model.rotary_emb(
            torch.zeros(1, dtype=torch.float64), torch.tensor([[position]])
        )
        for i in range(4):
            c, s = float(cos[0, 0, i]) / 6, float(sin[0, 0, i]) / 6
            turns[i, i] += c
            turns[i + 4, i + 4] += c
            turns[i, i + 4] -= s
            turns[i + 4, i] += s
    for layer in range(4):
        for head in range(2):
            keys = whole.layers[layer].keys[0, head].double().numpy()
            values = whole.layers[layer].values[0, head].double().numpy()
            total = np.zeros(20)
            for group in range(2):
                mean = turns @ found["mean"][layer, head, group].double().numpy()
                covariance = turns @ found["covariance"][layer, head, group].double().numpy()
                covariance = covariance @ turns.T
                logits = [k @ mean / 8**0.5 + k @ covariance @ k / 16 for k in keys[2:]]
                share = np.exp(logits - np.max(logits))
                total[2:] += share / share.sum() / 2
            wanted = (total + 0.01) * np.linalg.norm(values, axis=-1)
            close(seen[layer][0, head, 2:], wanted[2:])
