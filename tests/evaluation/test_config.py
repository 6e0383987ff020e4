import pytest

import cachepress as cp
from cachepress.evaluation import PRESS_REGISTRY, EvaluationConfig
from cachepress.evaluation.config import load_config
from cachepress.spec import aliases


def folder(**options):
    return EvaluationConfig(**options).get_results_dir().as_posix()


def test_the_folder_names_what_was_evaluated():
    assert (
        folder(
            dataset="longbench-e",
            data_dir="hotpotqa_e",
            model="meta-llama/Meta-Llama-3.1-8B-Instruct",
            press="snapkv",
            compression_ratio=0.5,
        )
        == "results/longbench-e__hotpotqa_e__Meta-Llama-3.1-8B-Instruct__snapkv__0.50"
    )


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({}, "builtin__smollm2-135m__no_press__0.00"),
        ({"press": "knorm", "compression_ratio": 0.875}, "__knorm__0.875"),
        ({"press": "KnormPress(0.1)"}, "__knorm__0.10"),
        ({"press": "knorm", "compression_ratio": 0.5, "seed": 3}, "__knorm__0.50__seed3"),
        ({"fraction": 0.25, "query_aware": True}, "__0.00__fraction0.25__query_aware"),
        ({"chat": True}, "__0.00__chat"),
        ({"chat": False, "truncation": True}, "__0.00__no-chat__truncation"),
        ({"truncation": "end"}, "__0.00__truncation-end"),
        ({"dataset": "/data/my facts.csv"}, "results/my-facts__smollm2-135m__no_press__0.00"),
        ({"model": "/models/tiny/"}, "builtin__tiny__no_press__0.00"),
        (
            {"press": "SnapKVPress(0.5, window_size=32)"},
            "__snapkv-window_size=32__0.50",
        ),
    ],
)
def test_further_parts_of_the_folder(options, end):
    assert folder(**options).endswith(end)


def test_different_presses_get_different_folders():
    spellings = ["snapkv", "snapkv(window_size=32)", "snapkv(kernel_size=7)", "random(seed=1)"]
    assert len({folder(press=spelling) for spelling in spellings}) == 4


def test_command_line_before_yaml_before_defaults(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("press_name: knorm\ncompression_ratio: 0.25\nfraction: 0.5\n")
    config = load_config(str(path), {"compression_ratio": 0.75})
    assert (config.press, config.compression_ratio, config.fraction) == ("knorm", 0.75, 0.5)
    assert config.make_press() == cp.KnormPress(0.75)
    assert config.seed == 0


def test_the_spelling_keeps_its_own_ratio():
    assert EvaluationConfig(press="KnormPress(0.3)").ratio == 0.3
    assert EvaluationConfig(press="KnormPress(0.3)", compression_ratio=0.6).ratio == 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"press": "nothing"}, "unknown press 'nothing'"),
        ({"press": "knorm", "compression_ratio": 1.0}, "got 1.0"),
        ({"press": "knorm", "compression_ratio": -0.1}, "got -0.1"),
        ({"press": "knorm", "compression_ratio": "abc"}, "compression_ratio: got 'abc'"),
        ({"compression_ratio": 0.5}, "no_press cannot have compression_ratio=0.5"),
        ({"fraction": 0.0}, "fraction: got 0.0"),
        ({"fraction": True}, "fraction: got True"),
        ({"seed": "x"}, "seed: got 'x', wanted int"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"log_level": "LOUD"}, "log_level: got 'LOUD'"),
        ({"model_kwargs": []}, "model_kwargs: got \\[\\], wanted dict"),
        ({"datset": "x"}, "unknown option 'datset'"),
    ],
)
def test_a_wrong_option_is_one_clear_line(options, message):
    with pytest.raises(cp.CachepressError, match=message) as caught:
        load_config(None, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("press: [unclosed", "is not YAML"),
        ("just a text", "wanted lines of the form option: value"),
        ("pres: knorm", "unknown option 'pres'"),
        (
            "seed: 4294967296",
            "got 4294967296, wanted .* -4294967295, at most 4294967295",
        ),
        (
            "max_new_tokens: 10000001",
            "tokens: got 10000001, wanted .* 1, at most 10000000",
        ),
        ('dataset: "a\\0b"', "dataset: got 'a\\\\x00b', wanted a text without NUL"),
        ("model_kwargs: {1: 2, a: 3}", "model_kwargs: got .* wanted names with values as in JSON"),
        ("model_kwargs: {a: 2001-01-01}", "wanted names with values as in JSON"),
        (f"press: {'a' * 20_000}", "got 20,000 characters"),
        ("? [1, 2]\n: 3", "unhashable|unknown option"),
    ],
)
def test_a_file_that_cannot_be_taken_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(cp.CachepressError, match=message) as caught:
        load_config(str(path), {})
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(cp.CachepressError, match="no.yaml: No such file"):
        load_config("no.yaml", {})


def test_the_shipped_files_are_complete():
    debug = load_config("evaluation/debug_config.yaml", {})
    assert (debug.dataset, debug.data_dir) == ("longbench-e", "hotpotqa_e")
    assert (debug.make_press(), debug.fraction) == (cp.SnapKVPress(0.5), 0.01)
    builtin = load_config("evaluation/builtin_config.yaml", {})
    assert (builtin.dataset, builtin.model) == ("builtin", "smollm2-135m")
    assert set(PRESS_REGISTRY) == {"no_press", *aliases()}


def test_the_folder_names_budgets_and_ways_to_read():
    assert folder(press="snapkv", prefill_chunk_size=64, prefill_mode="online").endswith(
        "__snapkv__0.00__prefill_chunk_size64__online"
    )
    assert folder(press="knorm", storage="int4").endswith("__knorm__0.00__int4")
    named = folder(press="KnormPress(n_kept=64)")
    assert named.endswith("__knorm-n_kept=64__0.00")
    assert folder(press="KnormPress(n_kept=32)") != named
    decoding = folder(press="DecodingPress(KnormPress(), target_size=64)")
    assert decoding.endswith("__decoding-knorm-target_size=64__0.00")
    nested = folder(press="AdaKVPress(KnormPress())", compression_ratio=0.75)
    assert nested.endswith("__adakv-knorm__0.75")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_mode": "online"}, "give a chunk size"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size: got 0"),
        ({"storage": "int8"}, "needs a press"),
        ({"press": "knorm", "storage": "int3"}, "storage: got 'int3'"),
        ({"press": "DecodingPress(KnormPress())", "compression_ratio": 0.5}, "give target_size"),
    ],
)
def test_ways_to_read_that_cannot_work_are_refused(options, message):
    with pytest.raises(cp.CachepressError, match=message):
        EvaluationConfig(**options)
