"""What is learned of a model, against plain forwards and numpy."""

from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, safe_open
from transformers import AutoTokenizer, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import cachepress as cp
from cachepress import train as trainer
from cachepress.cli import main
from cachepress.cli.measure import Kind
from cachepress.fits import _falling, budget_curve, descend, fit_gate, fit_linear, fit_mlp
from cachepress.presses import fastkvzip
from cachepress.train import KINDS, Training, _labelled, train, windows_of
from tests.bounds import EXACT, near, rounding
from tests.presses.test_kvzip import reference as kvzip_scores
from tests.tiny import tiny, tokenizer, tokens, words

WINDOWS = [tokens(30, seed=seed) for seed in range(3)]
TERMS = 4 * (4 * 32 + 8 + 2 * 30 + 48) + 3 * 30
"""What is summed in float32 on the way through the model, and over the windows."""


def training(name="llama", windows=WINDOWS, **options):
    return Training(tiny(name), windows, tokenizer(), quiet=True, **options)


def different(n, seed):
    """Token ids ``[1, n]`` of which no two are the same, so that no two keys are as long."""
    return 3 + torch.randperm(93, generator=torch.Generator().manual_seed(seed))[None, :n]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hooked(model, child, ids):
    """What a child of each attention module answers, ``[layer]`` of ``[n, heads, 8]``."""
    found = []
    hooks = [
        getattr(layer.self_attn, child).register_forward_hook(
            lambda m, a, out: found.append(out.detach().reshape(ids.shape[1], 4, 8))
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("name", "child"), [("llama", "q_proj"), ("qwen3", "q_norm")])
def test_query_stats_are_those_of_all_queries_before_rope_but_the_sinks(name, child):
    found = KINDS["query_stats"](training(name))
    by_window = [hooked(tiny(name), child, ids) for ids in WINDOWS]
    for layer, head in product(range(4), range(4)):
        queries = np.concatenate([w[layer][4:, head].double().numpy() for w in by_window])
        mean = found["mean"][layer, head // 2, head % 2]
        near(mean, queries.mean(0), torch.float32, terms=TERMS)
        covariance = found["covariance"][layer, head // 2, head % 2]
        near(covariance, np.cov(queries.T, bias=True), torch.float32, terms=TERMS)


def test_query_stats_need_more_than_the_sinks():
    with pytest.raises(cp.CachepressError, match="window: got 4, wanted more than the 4 sinks"):
        KINDS["query_stats"](training(windows=[tokens(4)]))


def test_q_filters_are_the_main_direction_of_the_queries_of_a_head_as_attention_uses_them():
    model = tiny()
    found = KINDS["q_filters"](training())["filters"]
    assert found.shape == (4, 2, 8)
    cos, sin = model.model.rotary_emb(torch.zeros(1, 30, 1), torch.arange(30)[None])
    by_layer = [[] for _ in range(4)]
    for ids in WINDOWS:
        for queries, out in zip(by_layer, hooked(model, "q_proj", ids), strict=True):
            query = out.transpose(0, 1)[None]  # [1, heads, n, 8]
            queries.append(apply_rotary_pos_emb(query, query, cos, sin)[0][0])
    for layer, head in product(range(4), range(2)):
        mean, bound = np.zeros(8), 0.0
        for group in range(2):
            queries = torch.cat([q[2 * head + group] for q in by_layer[layer]]).double().numpy()
            _, sizes, directions = np.linalg.svd(queries)
            # What turns the main direction is rounding against the distance to the next one.
            lead = 1 - (sizes[1] / sizes[0]) ** 2
            bound += 2 * rounding(torch.float32, TERMS) / lead / 2
            middle = (queries @ directions[0]).mean()
            assert abs(middle) > 4 * bound * np.linalg.norm(queries.mean(0))
            mean += directions[0] * np.sign(middle) / 2
        assert bound < 0.05
        torch.testing.assert_close(
            found[layer, head].double(), torch.from_numpy(mean), atol=bound, rtol=0
        )


def test_fit_linear_finds_a_linear_relation():
    hidden, weight = drawn(500, 12) * 3 + 2, drawn(3, 12, seed=1)
    targets = hidden @ weight.T + 5 + 0.1 * drawn(500, 3, seed=2)
    found = fit_linear(hidden, targets)
    assert found["weight"].shape == (3, 12) and found["bias"].shape == (3,)
    assert r_squared(F.linear(hidden, found["weight"], found["bias"]), targets) > 0.99
    # Ridge regression, with numpy: the penalty is a hundredth of the mean of the diagonal.
    x, y = hidden.double().numpy(), targets.double().numpy()
    x, y = x - x.mean(0), y - y.mean(0)
    penalty = 0.01 * np.trace(x.T @ x) / 12
    wanted = np.linalg.solve(x.T @ x + penalty * np.eye(12), x.T @ y).T
    near(found["weight"], wanted, torch.float32, terms=12)
    bias = targets.numpy().mean(0) - wanted @ hidden.numpy().mean(0)
    near(found["bias"], bias, torch.float32, terms=500 + 12)


def test_fit_linear_of_fewer_tokens_than_channels_is_finite():
    found = fit_linear(drawn(5, 12), drawn(5, 3))
    assert all(x.isfinite().all() for x in found.values())


def r_squared(guess, targets):
    return float(1 - (guess - targets).square().sum() / (targets - targets.mean(0)).square().sum())


def test_fit_mlp_finds_a_smooth_relation_that_is_not_linear():
    hidden = drawn(800, 32) * 4 + 1
    a, b = hidden[:, 0] / 4, hidden[:, 1] / 4
    targets = torch.stack([(2 * a).tanh(), 10 + F.softplus(3 * b)], dim=1)
    found = fit_mlp(hidden, targets, steps=600, seed=0)
    assert {k: tuple(x.shape) for k, x in found.items()} == {
        "0.weight": (4, 32),
        "0.bias": (4,),
        "2.weight": (2, 4),
        "2.bias": (2,),
    }
    inner = F.gelu(hidden @ found["0.weight"].T + found["0.bias"])
    assert r_squared(inner @ found["2.weight"].T + found["2.bias"], targets) > 0.9
    linear = fit_linear(hidden, targets)
    assert r_squared(F.linear(hidden, linear["weight"], linear["bias"]), targets) < 0.87


def test_descent_is_seeded_and_leaves_its_start_alone():
    start = {"x": torch.zeros(3)}

    def loss(learned, batch):
        return (learned["x"] - batch.float().mean()).square().sum()

    first, again = (descend(start, loss, 9, 20, seed=1)["x"] for _ in range(2))
    assert torch.equal(first, again) and not first.requires_grad
    assert not torch.equal(first, descend(start, loss, 9, 20, seed=2)["x"])
    assert start["x"].tolist() == [0, 0, 0]


def test_fit_gate_beats_the_best_constant():
    hidden = drawn(400, 16)
    targets = torch.sigmoid(3 * hidden[:, :2])
    found = fit_gate(hidden, targets, groups=2, steps=200, seed=0)
    assert {k: tuple(x.shape) for k, x in found.items()} == {
        "q_weight": (64, 16),
        "q_bias": (64,),
        "k_weight": (32, 16),
        "q_norm": (16,),
        "k_norm": (16,),
        "base": (2, 16, 16),
        "bias": (2, 2),
    }
    guess = fastkvzip.gate(hidden[None], found)[0].mT
    constant = targets.mean(0).expand_as(targets)
    ours = F.binary_cross_entropy(guess, targets)
    noise = F.binary_cross_entropy(targets, targets)
    assert ours - noise < 0.5 * (F.binary_cross_entropy(constant, targets) - noise)


def hidden_states(model, ids):
    """What the attention of each layer reads, ``[layer]`` of ``[n, M]``."""
    found = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda m, a, k: found.append(k["hidden_states"][0].detach()), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("plus", [False, True])
def test_labels_are_the_scores_of_kvzip_beside_the_hidden_states_of_the_tokens(plus):
    found = _labelled(training(), plus)
    hidden = [hidden_states(tiny(), ids) for ids in WINDOWS]
    wanted = [kvzip_scores(tiny(), ids, 2048, 4, plus) for ids in WINDOWS]
    last = torch.cat([h[3] for h in hidden])  # Where every token is another one.
    rows = torch.cdist(found[3][0], last).argmin(-1)
    assert sorted(rows.tolist()) == list(range(90))
    assert rows.tolist() != sorted(rows.tolist())
    for depth, (states, scores) in enumerate(found):
        every = torch.cat([h[depth] for h in hidden])
        near(states, every[rows], torch.float32, terms=TERMS)
        every = torch.cat([w[depth].mT for w in wanted])
        near(scores, every[rows], torch.float32, terms=TERMS)


def test_no_more_tokens_are_collected_than_are_fitted(monkeypatch):
    monkeypatch.setattr(trainer, "_MOST_ROWS", 20)
    found = _labelled(training(), plus=False)
    assert [tuple(x.shape) for pair in found for x in pair] == [(18, 32), (18, 2)] * 4


def test_kvzap_learns_the_logarithm_and_fastkvzip_the_score(monkeypatch):
    hidden, scores = drawn(50, 32), drawn(50, 2, seed=1).abs() * 2
    scores[3, 1] = 0
    asked = []

    def labelled(_, plus):
        asked.append(plus)
        return [(hidden, scores), (hidden + 1, scores)]

    monkeypatch.setattr(trainer, "_labelled", labelled)
    how = training(steps=3, seed=5)
    linear, mlp = KINDS["kvzap_linear"](how), KINDS["kvzap_mlp"](how)
    targets = scores.clamp(min=1e-12).log()
    for i in range(2):
        for name, wanted in fit_linear(hidden + i, targets).items():
            assert torch.equal(linear[f"layers.{i}.{name}"], wanted)
        for name, wanted in fit_mlp(hidden + i, targets, 3, 5).items():
            assert torch.equal(mlp[f"layers.{i}.{name}"], wanted)
    gates = KINDS["fastkvzip"](how)
    for name, wanted in fit_gate(hidden + 1, scores.clamp(0, 1), 2, 3, 5).items():
        assert torch.equal(gates[name][1], wanted)
    assert asked == [True, True, False]


def test_gains_are_the_attention_of_what_follows_in_the_order_of_the_press(monkeypatch):
    monkeypatch.setattr(trainer, "budget_curve", lambda gains: gains)
    windows = [different(40, seed) for seed in (7, 8)]
    found = KINDS["lukv"](training(windows=windows, press=cp.KnormPress(0.5)))["lukv"]
    model = tiny()
    model.set_attn_implementation("eager")
    wanted = torch.zeros(4, 2, 100)
    for ids in windows:
        cache = DynamicCache()
        with torch.no_grad():
            out = model(ids, output_attentions=True, past_key_values=cache)
        for layer, head in product(range(4), range(2)):
            weights = out.attentions[layer][0, 2 * head : 2 * head + 2, 30:, :30]
            worth = weights.sum(1).mean(0)
            norms = cache.layers[layer].keys[0, head, :30].norm(dim=-1)
            for place, row in enumerate(norms.argsort().tolist()):
                wanted[layer, head, 100 * place // 30] += worth[row]
    near(found, wanted, torch.float32, terms=TERMS)


def test_gains_of_a_press_that_reconstructs_are_in_the_order_of_its_scores(monkeypatch):
    monkeypatch.setattr(trainer, "budget_curve", lambda gains: gains)
    ids = different(40, 7)
    press = cp.KVzipPress(n_sink=0)
    found = KINDS["lukv"](training(windows=[ids], press=press))["lukv"]
    scores = kvzip_scores(tiny(), ids[:, :30], 2048, 0)
    model = tiny()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    for layer, head in product(range(4), range(2)):
        worth = attentions[layer][0, 2 * head : 2 * head + 2, 30:, :30].sum(1).mean(0)
        score, order = scores[layer, head].sort(descending=True)
        gaps = torch.cat([torch.ones(1), -score.diff(), torch.ones(1)])
        # Scores that are equal but for rounding may go either way.
        least = rounding(torch.float32, TERMS) * float(score[0])
        sure = (gaps[1:] > least) & (gaps[:-1] > least)
        assert sure.sum() >= 25
        ours = found[layer, head, torch.arange(30) * 100 // 30]
        near(ours[sure], worth[order][sure], torch.float32, terms=TERMS)


def test_lukv_wants_a_press():
    with pytest.raises(cp.CachepressError, match="give --press"):
        KINDS["lukv"](training())


def hull(gains):
    """Slopes of the least concave curve above the sums: each value by every chord over it."""
    sums = np.concatenate([[0], np.cumsum(gains)])
    n = len(gains)
    tops = [
        max(
            sums[i] if i == k else sums[i] + (sums[k] - sums[i]) * (at - i) / (k - i)
            for i in range(at + 1)
            for k in range(at, n + 1)
        )
        for at in range(n + 1)
    ]
    return np.diff(tops)


def test_the_concave_curve_is_the_one_of_all_chords():
    gains = drawn(3, 2, 9).abs()
    gains[0, 0] = torch.arange(9.0)
    gains[0, 1] = torch.arange(9.0).flip(0)
    gains[1, 0] = 0.0
    gains[1, 1, ::2] = 0.0
    found = _falling(gains)
    for layer, head in product(range(3), range(2)):
        wanted = hull(gains[layer, head].double().numpy())
        near(found[layer, head], wanted, torch.float32, terms=9)
    assert (found.diff(dim=-1) <= rounding(torch.float32, terms=9) * found.max()).all()


@pytest.mark.parametrize("falling", [True, False])
def test_shares_are_the_best_of_all_there_are(falling):
    gains = drawn(2, 2, 4, seed=3).abs()
    if falling:
        gains = gains.sort(dim=-1, descending=True).values
    curve = budget_curve(gains)
    assert curve.shape == (99, 2, 2)
    worth = np.array([hull(g) for g in gains.flatten(0, 1).double().numpy()])
    sums = np.concatenate([np.zeros((4, 1)), worth.cumsum(1)], axis=1)

    def value(counts):
        return sum(sums[head, n] for head, n in enumerate(counts))

    for percent in (1, 10, 37, 50, 80, 99):
        counts = (4 * curve[percent - 1]).flatten().round().long().tolist()
        total = (100 - percent) * 16 // 100
        every = [c for c in product(range(5), repeat=4) if sum(c) == total]
        assert sum(counts) == total
        assert value(counts) == pytest.approx(max(value(c) for c in every), abs=EXACT)


def test_curves_fall_with_the_ratio_and_their_totals_are_those_of_equal_shares():
    gains = drawn(4, 2, 100).abs()
    gains[2] *= 20
    curve = budget_curve(gains)
    assert (curve.diff(dim=0) <= 0).all() and curve.min() >= 0 and curve.max() <= 1
    wanted = torch.tensor([8 * (100 - percent) for percent in range(1, 100)])
    assert torch.equal((100 * curve).flatten(1).sum(1).round().long(), wanted)
    assert curve[49, 2].mean() > 0.9 > 0.5 > curve[49, 0].mean()


def test_windows_are_pieces_of_the_text_in_an_order_drawn_by_the_seed():
    make, text = tokenizer(), words(105)
    pieces = torch.tensor(make(text).input_ids)[:100].view(10, 10)
    every = windows_of(make, text, 1000, 10, seed=0)
    assert all(ids.shape == (1, 10) for ids in every)
    assert {tuple(ids[0].tolist()) for ids in every} == {tuple(p) for p in pieces.tolist()}
    some = windows_of(make, text, 39, 10, seed=0)
    assert [ids.tolist() for ids in some] == [ids.tolist() for ids in every[:3]]
    other = windows_of(make, text, 1000, 10, seed=1)
    assert [ids.tolist() for ids in other] != [ids.tolist() for ids in every]


def test_there_is_prose_to_learn_from():
    make = tokenizer()
    assert len(windows_of(make, None, 10**9, 1000, 0)) >= 20


@pytest.mark.parametrize(("n", "asked"), [(9, 100), (50, 9)])
def test_a_text_shorter_than_a_window_is_refused(n, asked):
    message = f"the text has {n} tokens, of which {asked} are read: wanted at least one window"
    with pytest.raises(cp.CachepressError, match=message):
        windows_of(tokenizer(), words(n), asked, 10, 0)


def test_what_is_learned_is_written_with_what_it_was_made_from(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEPRESS_HOME", str(tmp_path))
    how = training()
    how.model.config.name_or_path = "org/some-model"
    path = train("q_filters", how)
    assert path == tmp_path / "learned" / "org--some-model" / "q_filters.safetensors"
    assert torch.equal(load_file(path)["filters"], KINDS["q_filters"](how)["filters"])
    with safe_open(path, framework="pt") as file:
        made = file.metadata()
    assert (made["kind"], made["model"], made["tokens"]) == ("q_filters", "org/some-model", "90")
    assert cp.QFilterPress(0.5).for_model(how.model) == cp.QFilterPress(0.5, filters=str(path))
    with pytest.raises(cp.CachepressError, match="kind: got 'nope', wanted one of query_stats, q_"):
        train("nope", how)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_offered_and_fits_its_press(kind, tmp_path):
    assert kind in get_args(Kind) and len(KINDS) == len(get_args(Kind))
    snap = cp.SnapKVPress(0.5, window_size=4)
    path = str(train(kind, training(press=snap, steps=2), f"{tmp_path}/{kind}.safetensors"))
    press = {
        "query_stats": cp.ExpectedAttentionStatsPress(0.5, stats=path),
        "q_filters": cp.QFilterPress(0.5, filters=path),
        "kvzap_linear": cp.KVzapPress(0.5, model_type="linear", surrogate=path),
        "kvzap_mlp": cp.KVzapPress(0.5, surrogate=path),
        "fastkvzip": cp.FastKVzipPress(0.5, gates=path),
        "lukv": cp.LUKVPress(snap, curve=path),
    }[kind]
    assert press.for_model(tiny()) == press
    assert all(x.isfinite().all() for x in load_file(path).values())


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(words(100))
    return path


def test_the_command_writes_what_the_press_reads(model_dir, text, tmp_path, capsys):
    output = tmp_path / "out.safetensors"
    options = [f"--model={model_dir}", f"--text={text}", "--device=cpu", "--seed=3"]
    sizes = ["--tokens=80", "--window=20", f"--output={output}"]
    assert main(["train", "q_filters", *options, *sizes]) == 0
    assert capsys.readouterr().out == f"written: {output}\n"
    windows = windows_of(AutoTokenizer.from_pretrained(model_dir), words(100), 80, 20, 3)
    assert len(windows) == 4
    wanted = KINDS["q_filters"](training(windows=windows))["filters"]
    near(load_file(output)["filters"], wanted, torch.float32, terms=TERMS)


def test_the_command_writes_where_presses_look(model_dir, text, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEPRESS_HOME", str(tmp_path))
    options = [f"--model={model_dir}", f"--text={text}", "--device=cpu", "--window=40"]
    assert main(["train", "lukv", *options, "--press", "snapkv(window_size=4)"]) == 0
    (path,) = tmp_path.glob("learned/tiny-llama-*/lukv.safetensors")
    model = tiny()
    model.config.name_or_path = model_dir
    press = cp.LUKVPress(cp.SnapKVPress(0.5, window_size=4)).for_model(model)
    assert press.curve == str(path)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("nope", [], "invalid choice: 'nope'"),
        (
            "q_filters",
            ["--window=0"],
            "got '0', wanted a whole number of at least 1",
        ),
        (
            "q_filters",
            ["--tokens=-5"],
            "got '-5', wanted a whole number of at least 1",
        ),
        ("q_filters", ["--text=missing.txt"], "missing.txt: No such file or directory"),
        ("q_filters", ["--text={bad}"], "is not a text in UTF-8"),
        ("q_filters", ["--window=500"], "the text has 100 tokens"),
        ("q_filters", ["--model=no/such-model"], "'no/such-model'"),
        ("q_filters", ["--dtype=float99"], "float99"),
        ("query_stats", ["--window=3"], "wanted more than the 4 sinks"),
        ("lukv", [], "give --press"),
        ("lukv", ["--press=nope"], "unknown press 'nope'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    model_dir, text, tmp_path, capsys, kind, options, message
):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe\x00")
    given = [f"--model={model_dir}", f"--text={text}", "--device=cpu", "--window=20"]
    given += [f"--output={tmp_path / 'out'}", *(option.format(bad=bad) for option in options)]
    try:
        code = main(["train", kind, *given])
    except SystemExit as stopped:
        code = stopped.code
    err = capsys.readouterr().err.strip()
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_line(model_dir, text, capsys):
    given = [f"--model={model_dir}", f"--text={text}", "--device=cpu", "--window=20"]
    assert main(["train", "q_filters", *given, f"--output={text}/out"]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(f"cachepress: error: cannot write {text}/out: ")
    )
