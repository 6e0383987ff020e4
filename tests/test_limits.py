"""What no user can make the library do: count without end, obey a name, say more than a line."""

import dataclasses

import pytest
import torch

import cachepress as cp
from cachepress.bench import BenchOptions
from cachepress.catalogue import example, own_presses
from cachepress.cli import main
from cachepress.errors import out_of_memory
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.sweep import SweepConfig
from cachepress.limits import (
    LONGEST_SHOWN,
    LONGEST_SPELLING,
    MOST,
    MOST_BYTES,
    MOST_SEED,
    MOST_TOKENS,
    is_out_of_memory,
    is_whole,
    said,
    shown,
    visible,
)
from tests.bounds import near
from tests.tiny import tiny, tokenizer, tokens

ENDLESS = 10**5000


def test_what_is_said_is_one_line_and_no_longer_than_asked():
    error = ValueError("line 1:\n   wanted\ta number\r\n")
    assert said(error) == "line 1: wanted a number"
    assert said(error, 23) == "line 1: wanted a number" and said(error, 8) == "line 1:…"


def test_whole_numbers_have_one_bound():
    assert is_whole(MOST, 1) and not is_whole(MOST + 1, 1)
    assert not is_whole(0, 1) and not is_whole(True, 0) and not is_whole(1.0, 0)
    cp.LeverageScorePress(0.5, sketch_dimension=MOST)
    with pytest.raises(cp.CachepressError, match=f"at most {MOST}"):
        cp.LeverageScorePress(0.5, sketch_dimension=MOST + 1)
    for build in (
        lambda n: cp.SnapKVPress(0.5, window_size=n),
        lambda n: cp.AdaKVPress(cp.StreamingLLMPress(0.5, n_sink=n)),
        lambda n: cp.ChunkPress(cp.KnormPress(0.5), n),
        lambda n: cp.Codec(8, n),
        lambda n: cp.prefill(tiny(), tokens(3), chunk_size=n),
    ):
        build(MOST_TOKENS)
        for n in (MOST_TOKENS + 1, 2**63, 10**30, ENDLESS):
            with pytest.raises(
                cp.CachepressError, match="wanted (a (whole )?number|at most)"
            ) as caught:
                build(n)
            assert len(str(caught.value)) < 2 * LONGEST_SHOWN
    assert cp.RandomPress(0.5, seed=MOST_SEED).seed == 4294967295
    with pytest.raises(cp.CachepressError, match=f"at most {MOST_SEED}"):
        cp.RandomPress(0.5, seed=MOST_SEED + 1)
    assert cp.KnormPress(max_bytes=MOST_BYTES).max_bytes == MOST_BYTES
    with pytest.raises(cp.CachepressError, match="wanted at most"):
        cp.KnormPress(max_bytes="9999999999999GiB")


@pytest.mark.parametrize(
    "build",
    [
        lambda n: cp.KnormPress(n_kept=n),
        lambda n: cp.SnapKVPress(0.5, window_size=4, kernel_size=n),
        lambda n: cp.SnapKVPress(0.5, window_size=4, kernel_size=n, pooling="max"),
        lambda n: cp.SnapKVPress(0.5, window_size=n),
        lambda n: cp.StreamingLLMPress(0.5, n_sink=n),
        lambda n: cp.ChunkKVPress(cp.KnormPress(0.5), n),
        lambda n: cp.BlockPress(cp.KeyDiffPress(0.5), n),
        lambda n: cp.CompactorPress(0.5, sink_size_start=n),
    ],
)
def test_numbers_far_beyond_the_text_are_all_of_it_and_allocate_nothing(build):
    held = [
        [layer.positions.sort().values for layer in cp.prefill(tiny(), tokens(40), build(n)).layers]
        for n in (101, MOST_TOKENS)
    ]
    for few, all_ in zip(*held, strict=True):
        assert torch.equal(few, all_)


def test_keeping_more_than_any_text_has_keeps_all():
    for n in (2**31, 10**12, MOST_BYTES):
        assert cp.size_of(cp.prefill(tiny(), tokens(40), cp.KnormPress(n_kept=n))).ratio == 0


def test_merging_far_is_merging_with_all():
    model, said = tiny(), []
    for n in (100, MOST_TOKENS):
        cache = cp.prefill(model, tokens(40), cp.CAMPress(cp.KnormPress(), 4, 12, merge_budget=n))
        with torch.no_grad():
            said.append([model(tokens(1), past_key_values=cache).logits for _ in range(6)])
    few, far = said
    assert torch.equal(torch.stack(few), torch.stack(far))


@pytest.mark.parametrize("press", [cp.KnormPress(0.5), cp.AdaKVPress(cp.KnormPress(0.5))])
@pytest.mark.parametrize("n", [1, 20])
def test_padding_of_a_float64_model_with_eager_attention_is_nothing(press, n):
    model = tiny().double()
    model.set_attn_implementation("eager")
    ids = tokens(60, 2)
    ids[1, :20] = 0
    mask = (ids > 0).long()
    length, more = mask.sum(-1, keepdim=True), tokens(n, 2)
    after = {"attention_mask": torch.cat([mask, torch.ones_like(more)], 1)}
    after["position_ids"] = length + torch.arange(n)
    with torch.no_grad():
        both = model(
            more, past_key_values=cp.prefill(model, ids, press, attention_mask=mask), **after
        ).logits
        alone = model(more[1:], past_key_values=cp.prefill(model, ids[1:, 20:], press)).logits
    assert both.isfinite().all()
    # Norms, rotary and softmax are float32 in transformers, whatever the model is.
    near(both[1:], alone, torch.float32, terms=80, depth=4)


@pytest.mark.parametrize(
    "build",
    [
        lambda: cp.CapPress(0.5, tau=ENDLESS),
        lambda: cp.ExpectedAttentionPress(0.5, use_vnorm=ENDLESS),
        lambda: cp.KVzipPress(0.5, layerwise="yes"),
        lambda: cp.KnormPress(ENDLESS),
    ],
)
def test_values_that_no_option_takes_are_refused_when_built(build):
    with pytest.raises(cp.CachepressError, match="got") as caught:
        build()
    assert len(str(caught.value)) < 2 * LONGEST_SHOWN


def test_a_ratio_of_any_number_of_decimals_keeps_what_it_says():
    for ratio, kept in ((1e-320, 59), (0.123456789012345678, 52), (0.5, 30)):
        cache = cp.prefill(tiny(), tokens(60), cp.H2OPress(ratio))
        assert {int(n) for layer in cache.layers for n in layer.lengths.flatten()} == {kept}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" * (LONGEST_SPELLING + 1), "got 10,001 characters, wanted at most 10,000"),
        ("chunk(" * 100 + "knorm" + ")" * 100, "nested more than 40 deep"),
        ("(" * 5000, "cannot be read"),
        ("knorm(" + "-" * 9000 + "1)", "nested too deeply|cannot be read|neither"),
        ("knorm(n_kept=0x" + "f" * 5000 + ")", "too large to show"),
        ("knorm([1])", "got \\[1\\]"),
        ("ScorerPress(0.5)", "unknown press 'ScorerPress'"),
        ("WrapperPress(knorm)", "unknown press 'WrapperPress'"),
        ("1()", "neither a literal nor a press"),
        ("knorm\0", "cannot be read"),
        ("\ud800", "cannot be read|unknown press"),
    ],
)
def test_no_spelling_is_raw(text, message, recwarn):
    with pytest.raises(cp.CachepressError, match=message):
        cp.parse(text)
    assert not recwarn.list


def test_what_is_shown_fits_into_a_line():
    assert shown("x" * 500) == "'" + "x" * 198 + "…"
    assert shown(ENDLESS) == "<int that is too large to show>"
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert shown(nested) == "<list that is too large to show>"
    while nested:  # Freeing it from outside in would recurse.
        nested = nested.pop()


def test_control_characters_are_shown_and_all_else_is_left():
    assert visible("a\x1b[2J\r\x9b\u202eb\x7f\ud800") == r"a\x1b[2J\r\x9b\u202eb\x7f\ud800"
    plain = "é, 日本語, 😀,\ttab\nline \u200d\\x1b"
    assert visible(plain) == plain


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_is_known_and_says_what_to_do(error):
    assert is_out_of_memory(error)
    assert "smaller batch size, a prefill chunk size" in str(out_of_memory(error))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_prefill_that_runs_out_of_memory_says_so(monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(cp.KnormPress, "score", full)
    with pytest.raises(cp.CachepressError, match="out of memory: DefaultCPUAllocator: can't"):
        cp.prefill(tiny(), tokens(30), cp.KnormPress(0.5))
    monkeypatch.setattr(cp.KnormPress, "score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cp.prefill(tiny(), tokens(30), cp.KnormPress(0.5))


FIELDS = [
    (kind, f.name)
    for kind in own_presses().values()
    for f in dataclasses.fields(kind)
    if f.type in ("int", "int | None", int)
]


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_every_whole_number_of_a_press_is_within_bounds(kind, name):
    press = example(kind, 0.5)
    for got in (MOST_BYTES + 1, -MOST_BYTES - 1, 10**30, ENDLESS, 0.5, "x"):
        with pytest.raises(cp.CachepressError, match=f"{name}: got .*, wanted "):
            dataclasses.replace(press, **{name: got})


WHOLE = {
    "max_new_tokens": MOST,
    "max_context_length": MOST_TOKENS,
    "prefill_chunk_size": MOST_TOKENS,
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_options_of_an_evaluation_have_one_bound_wherever_they_stand(tmp_path, capsys, name):
    most, path = WHOLE[name], tmp_path / "options.yaml"
    assert getattr(EvaluationConfig(**{name: most}), name) == most
    for got in (0, -1, most + 1, 10**30):
        wanted = f"got {got}, wanted a whole number of at least 1, at most {most}"
        with pytest.raises(cp.CachepressError, match=f"^{name}: {wanted}$"):
            EvaluationConfig(**{name: got})
        path.write_text(f"{name}: {got}\n")
        assert main(["evaluate", f"--config={path}"]) == 2
        # Python's parser of YAML takes no number of more than 18 digits.
        assert name in capsys.readouterr().err or got == 10**30
        with pytest.raises(SystemExit):
            main(["evaluate", f"--{name.replace('_', '-')}={got}"])
        assert wanted.replace(f"got {got}", f"got '{got}'") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "most"),
    [
        ("bench", "lengths", MOST),
        ("bench", "forks", MOST),
        ("bench", "batch-sizes", MOST),
        ("bench", "steps", MOST),
        ("bench", "repeats", MOST),
        ("bench", "layers", MOST),
        ("bench", "prefill-chunk-size", MOST_TOKENS),
        ("sweep", "workers", MOST),
        ("sweep", "batch-size", MOST),
        ("presses", "length", MOST),
        ("train", "window", MOST),
        ("inspect", "max-new-tokens", MOST),
    ],
)
def test_the_options_of_other_commands_have_them_too(capsys, command, option, most):
    for got in (0, most + 1, 10**400, "1.5", "x"):
        with pytest.raises(SystemExit):
            main([command, f"--{option}={got}"])
        assert f"wanted a whole number of at least 1, at most {most}" in capsys.readouterr().err


@pytest.mark.parametrize("n", [0, -1, 10**30, 1.5, True])
def test_whole_numbers_of_calls_are_within_bounds(n):
    model, made = tiny(), tokenizer()
    cache = cp.prefill(model, tokens(9), cp.KnormPress(0.5))
    with pytest.raises(cp.CachepressError, match="wanted a whole number of at least 1, at most"):
        cp.fork(cache, n)
    with pytest.raises(cp.CachepressError, match="max_new_tokens: got .* wanted a whole number"):
        cp.ask(model, made, cache, "w5", max_new_tokens=n)
    with pytest.raises(cp.CachepressError, match="steps: got .* wanted a whole number"):
        BenchOptions(steps=n)
    with pytest.raises(cp.CachepressError, match="workers: got .* wanted a whole number"):
        SweepConfig(workers=n)
