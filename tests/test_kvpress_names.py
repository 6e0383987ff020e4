"""What comes from kvpress: the names of its evaluation, its classes, and its arguments."""

import inspect
import logging
import re
from pathlib import Path

import pytest

import cachepress as cp
from cachepress import spec
from cachepress.evaluation.config import EvaluationConfig, load_config
from cachepress.kvpress_names import SPELLINGS
from tests.tiny import tiny

PAGE = (Path(__file__).parents[1] / "docs" / "coming-from-kvpress.md").read_text(encoding="utf-8")
REFUSED = {"RestoreKV", "RestoreKV_plus"}
NAMES = [
    "adakv_snapkv",
    "block_keydiff",
    "chunkkv",
    "critical_adakv_expected_attention",
    "critical_adakv_snapkv",
    "critical_expected_attention",
    "critical_snapkv",
    "cur",
    "duo_attention",
    "duo_attention_on_the_fly",
    "expected_attention",
    "fastkvzip",
    "finch",
    "keydiff",
    "kvcompose",
    "kvcompose_unstructured",
    "kvzip",
    "kvzip_plus",
    "kvzap_linear",
    "kvzap_mlp",
    "kvzap_mlp_head",
    "kvzap_mlp_layer",
    "lagkv",
    "lukv",
    "knorm",
    "observed_attention",
    "pyramidkv",
    "qfilter",
    "random",
    "RestoreKV",
    "RestoreKV_plus",
    "snap_think",
    "snapkv",
    "streaming_llm",
    "think",
    "tova",
    "compactor",
    "adakv_compactor",
    "no_press",
    "cam_streaming_llm",
    "cam_knorm",
    "cam_adakv_snapkv",
    "cam_tova",
    "decoding_knorm",
    "decoding_streaming_llm",
    "decoding_tova",
    "decoding_qfilter",
    "decoding_adakv_expected_attention_e2",
    "decoding_adakv_snapkv",
    "decoding_keydiff",
    "merging_knorm",
    "merging_snapkv",
    "merging_expected_attention",
    "merging_kvzap_mlp",
]
CLASSES = [
    "CriticalAdaKVPress",
    "CriticalKVPress",
    "CURPress",
    "AdaKVPress",
    "BasePress",
    "ComposedPress",
    "ScorerPress",
    "ExpectedAttentionPress",
    "KnormPress",
    "ObservedAttentionPress",
    "RandomPress",
    "RestoreKVPress",
    "SimLayerKVPress",
    "SnapKVPress",
    "StreamingLLMPress",
    "ThinKPress",
    "TOVAPress",
    "KVPressTextGenerationPipeline",
    "PerLayerCompressionPress",
    "KeyRerotationPress",
    "ChunkPress",
    "DuoAttentionPress",
    "ChunkKVPress",
    "QFilterPress",
    "PyramidKVPress",
    "FinchPress",
    "LagKVPress",
    "BlockPress",
    "KeyDiffPress",
    "KVgradPress",
    "KVzipPress",
    "ExpectedAttentionStatsPress",
    "CAMPress",
    "DecodingPress",
    "CompressionRatioDecodingPress",
    "PrefillDecodingPress",
    "CompactorPress",
    "LeverageScorePress",
    "NonCausalAttnPress",
    "KVzapPress",
    "DMSPress",
    "FastKVzipPress",
    "KVComposePress",
    "MergingPress",
    "CapPress",
    "LUKVPress",
    "EntropyGatedChunkKVPress",
]
ARGUMENTS = {
    "AdaKVPress": "press alpha_safeguard",
    "BlockPress": "press block_size",
    "CAMPress": "base_press compression_interval target_size hidden_states_buffer_size "
    "merge_budget",
    "CURPress": "compression_ratio num_sinks leverage_type use_random_leverage "
    "use_local_approximation local_window_size",
    "CapPress": "compression_ratio tau n_future_positions n_sink epsilon",
    "ChunkKVPress": "press chunk_length",
    "ChunkPress": "press chunk_length",
    "CompactorPress": "compression_ratio sink_size_start sink_size_end chunk_size "
    "sketch_dimension blending",
    "ComposedPress": "presses",
    "CompressionRatioDecodingPress": "base_press compression_interval hidden_states_buffer_size "
    "target_compression_ratio",
    "CriticalAdaKVPress": "press alpha_safeguard epsilon first_stage_ratio",
    "CriticalKVPress": "press epsilon first_stage_ratio",
    "DMSPress": "press threshold sliding_window_size decoding",
    "DecodingPress": "base_press compression_interval target_size hidden_states_buffer_size",
    "DuoAttentionPress": "head_compression_ratio on_the_fly_scoring",
    "EntropyGatedChunkKVPress": "press chunk_length low_entropy_chunk_length",
    "ExpectedAttentionPress": "compression_ratio n_future_positions n_sink use_covariance "
    "use_vnorm epsilon",
    "ExpectedAttentionStatsPress": "compression_ratio n_future_positions n_sink use_covariance "
    "use_vnorm epsilon sample_seq_len num_samples dataset_name stats_folder",
    "FastKVzipPress": "compression_ratio layerwise n_sink window_size window_ratio",
    "FinchPress": "compression_ratio chunk_length normalize_scores rerotate_keys",
    "KVComposePress": "structured compression_ratio agg_task agg_group agg_head add_v_norm "
    "add_mean_across_heads keep_token_lower_bound",
    "KVgradPress": "compression_ratio layerwise n_sink chunk_size",
    "KVzapPress": "compression_ratio model_type",
    "KVzipPress": "compression_ratio layerwise n_sink kvzip_plus_normalization chunk_size",
    "KeyRerotationPress": "press",
    "LUKVPress": "press compression_ratio sink window",
    "LagKVPress": "compression_ratio n_sink lag_size cross_scoring",
    "LeverageScorePress": "compression_ratio sketch_dimension",
    "MergingPress": "press similarity_threshold merge_fraction",
    "NonCausalAttnPress": "compression_ratio chunk_size",
    "PerLayerCompressionPress": "press compression_ratios",
    "PrefillDecodingPress": "prefilling_press decoding_press",
    "PyramidKVPress": "compression_ratio window_size kernel_size beta",
    "RandomPress": "compression_ratio seed",
    "RestoreKVPress": "compression_ratio layerwise n_sink kvzip_plus_normalization chunk_size",
    "SimLayerKVPress": "lazy_threshold n_last n_recent n_initial",
    "SnapKVPress": "compression_ratio window_size kernel_size",
    "StreamingLLMPress": "compression_ratio n_sink",
    "ThinKPress": "key_channel_compression_ratio window_size",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_evaluation_parses_and_reads_back(name):
    if name in REFUSED:
        for text in (name, f"kvpress:{name}"):
            with pytest.raises(cp.CachepressError, match="RestoreKV .*: use KVzipPress"):
                cp.parse(text)
        return
    press = cp.parse(f"kvpress:{name}")
    assert press == cp.parse(SPELLINGS[name]) == cp.parse(f" kvpress:{name} ")
    if press is not None:
        assert cp.parse(repr(press)) == press
        assert cp.parse(spec.brief(press, 0.25)) == press
    else:
        assert name == "no_press"


def test_the_names_are_those_of_the_peer():
    assert len(NAMES) == 54
    assert set(SPELLINGS) == set(NAMES)


@pytest.mark.parametrize(
    ("name", "press"),
    [
        ("expected_attention", cp.AdaKVPress(cp.ExpectedAttentionPress(epsilon=1e-2))),
        ("lukv", cp.LUKVPress(cp.ExpectedAttentionPress(epsilon=2e-2), sink=4, window=1)),
        ("kvzap_mlp_layer", cp.AdaKVPress(cp.KVzapPress(model_type="mlp"))),
        ("kvzip_plus", cp.KVzipPress(kvzip_plus_normalization=True)),
        ("cam_adakv_snapkv", cp.CAMPress(cp.AdaKVPress(cp.SnapKVPress()))),
        ("snapkv(0.5)", cp.SnapKVPress(0.5)),
        ("think(0.5)", cp.ThinKPress(0.5)),
        ("duo_attention(0.5)", cp.DuoAttentionPress(0.5, on_the_fly_scoring=False)),
        ("snap_think(0.5)", cp.ComposedPress([cp.SnapKVPress(0.5), cp.ThinKPress(0.0)])),
        ("adakv_snapkv(compression_ratio=0.5)", cp.AdaKVPress(cp.SnapKVPress(0.5))),
        ("decoding_knorm(target_size=9)", cp.DecodingPress(cp.KnormPress(), target_size=9)),
        ("kvzap_linear(threshold=-4)", cp.DMSPress(cp.KVzapPress(model_type="linear"), -4)),
        (
            "snap_think(compression_ratio=0.5, key_channel_compression_ratio=0.25)",
            cp.ComposedPress([cp.SnapKVPress(0.5), cp.ThinKPress(0.25)]),
        ),
    ],
)
def test_names_mean_what_they_mean_there(name, press):
    assert cp.parse(f"kvpress:{name}") == press
    if name.partition("(")[0] not in spec.aliases():
        assert cp.parse(name) == press


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kvpress:snapk", "unknown press 'kvpress:snapk': did you mean 'kvpress:snapkv'"),
        ("kvpress:", "cannot be read"),
        ("kvpress:knorm(", "cannot be read"),
        ("kvpress:SnapKVPress()", "SnapKVPress is a name of this package, leave 'kvpress:' out"),
        ("kvpress:snapkv(kernel_size=3, kernel_size=5)", "by its name and once, got kernel_size"),
        ("SnapKVPress(kernel_size=3, kernel_size=5)", "by its name and once, got kernel_size"),
        ("adakv_snapkv(press=" * 60 + "knorm" + ")" * 60, "nested more than 40 deep"),
        ("kvpress:snapkv(**{'a': 1})", r"by its name and once, got \*\*"),
        ("kvpress:3", "unknown press"),
        ("kvpress:knorm(0.5, 3)", "wanted one ratio"),
        ("kvpress:knorm(0.5, compression_ratio=0.5)", "wanted one ratio"),
        ("kvpress:snapkv(window=3)", "SnapKVPress has no option 'window'"),
        ("kvpress:snap_think(window=3)", "has an option 'window'"),
        ("kvpress:snapkv(compression_ratio='x')", "got 'x'"),
        ("kvpress:decoding_knorm(0.5)", "DecodingPress has no compression ratio: give target_size"),
        ("kvpress:no_press(0.5)", "no_press stands alone"),
    ],
)
def test_what_is_none_of_the_names_is_one_line(text, message):
    with pytest.raises(cp.CachepressError, match=message) as error:
        cp.parse(text)
    assert "\n" not in str(error.value)


def test_a_name_of_ours_stays_ours_and_what_differs_is_logged_once(caplog):
    spec._say_what_differs.cache_clear()
    with caplog.at_level(logging.WARNING, "cachepress"):
        for _ in range(2):
            assert cp.parse("expected_attention") == cp.ExpectedAttentionPress()
            assert cp.parse("duo_attention") == cp.DuoAttentionPress()
            for name in set(NAMES) & set(spec.aliases()):
                cp.parse(name)
                cp.parse(f"kvpress:{name}")
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(line.split()[0] for line in lines) == ["duo_attention", "expected_attention"]
    line = next(line for line in lines if line.startswith("expected_attention"))
    assert line == (
        "expected_attention is ExpectedAttentionPress() here, and "
        "AdaKVPress(ExpectedAttentionPress(epsilon=0.01)) in kvpress: write "
        "kvpress:expected_attention for that"
    )


def test_a_name_that_needs_a_press_here_takes_the_press_of_the_peer():
    wanted = cp.ChunkKVPress(cp.SnapKVPress(), chunk_length=20)
    assert cp.parse("chunkkv") == wanted
    assert cp.parse("adakv(chunkkv)") == cp.AdaKVPress(wanted)
    assert cp.parse("chunkkv(knorm)") == cp.ChunkKVPress(cp.KnormPress())


def test_an_evaluation_takes_the_names_and_calls_its_results_by_their_presses(tmp_path):
    config = EvaluationConfig(press="kvpress:expected_attention", compression_ratio=0.5)
    ours = EvaluationConfig(
        press="AdaKVPress(ExpectedAttentionPress(epsilon=0.01))", compression_ratio=0.5
    )
    assert config.press_name == "adakv(expected_attention(epsilon=0.01))"
    assert config.identity() == ours.identity()
    assert config.get_results_dir() == ours.get_results_dir()
    file = tmp_path / "config.yaml"
    file.write_text("press_name: kvpress:adakv_snapkv\ncompression_ratio: 0.25\n")
    assert load_config(str(file), {}).make_press() == cp.AdaKVPress(cp.SnapKVPress(0.25))


def test_what_is_learned_or_chosen_is_asked_for_at_use_only(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHEPRESS_HOME", str(tmp_path))
    for name, message in (
        ("qfilter(0.5)", "nothing was learned of .* for q_filters"),
        ("decoding_qfilter", "nothing was learned of .* for q_filters"),
        ("fastkvzip(0.5)", "nothing was learned of .* for fastkvzip"),
        ("kvzap_mlp_head(0.5)", "nothing was learned of .* for kvzap_mlp"),
        ("lukv(0.5)", "nothing was learned of .* for lukv"),
        ("duo_attention(head_compression_ratio=0.5)", "has no pattern, and on_the_fly_scoring=Fa"),
        ("kvzap_linear", "has none: give it one, such as threshold=-4"),
    ):
        press = cp.parse(f"kvpress:{name}")
        with pytest.raises(cp.CachepressError, match=message), press(tiny()):
            pass


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_the_peer_is_here(name):
    kind = getattr(cp, name)
    wanted = set(ARGUMENTS.get(name, "").split())
    assert wanted <= set(inspect.signature(kind).parameters)
    assert f"`{name}`" in PAGE


def test_the_class_that_is_refused_says_why():
    with pytest.raises(cp.CachepressError, match="RestoreKVPress: .* use KVzipPress"):
        cp.RestoreKVPress(0.5, kvzip_plus_normalization=True)


def test_arguments_of_the_peer_are_ours_by_another_name():
    knorm = cp.KnormPress()
    assert cp.DecodingPress(base_press=knorm, target_size=8) == cp.DecodingPress(knorm, 512, 8)
    assert cp.CAMPress(base_press=knorm, merge_budget=2) == cp.CAMPress(knorm, merge_budget=2)
    assert cp.CompressionRatioDecodingPress(
        base_press=knorm, target_compression_ratio=0.25
    ) == cp.CompressionRatioDecodingPress(knorm, 512, 0.25)
    assert cp.parse("decoding(base_press=knorm)") == cp.DecodingPress(knorm)
    assert cp.LUKVPress(knorm, compression_ratio=0.5) == cp.LUKVPress(cp.KnormPress(0.5))
    assert cp.LUKVPress() == cp.LUKVPress(cp.ExpectedAttentionPress(epsilon=0.02))
    stats = cp.ExpectedAttentionStatsPress
    assert stats(0.5, stats_folder="a") == stats(0.5, stats="a")
    named = stats(0.5, dataset_name="some/set", num_samples=7, n_sink=2)
    assert named == stats(
        0.5, n_sink=2, stats="alessiodevoto/exp_att_stats_{model}_some_set_7_1000_2"
    )
    for kind, twice in (
        (cp.DecodingPress, {"press": knorm, "base_press": knorm}),
        (cp.CAMPress, {"press": knorm, "base_press": knorm}),
        (stats, {"stats": "a", "stats_folder": "b"}),
    ):
        with pytest.raises(cp.CachepressError, match="got both .* which are one option"):
            kind(**twice)
    for kind in (cp.DecodingPress, cp.CAMPress, cp.CompressionRatioDecodingPress):
        with pytest.raises(cp.CachepressError, match="wraps a press: got none"):
            kind()


def test_the_page_has_every_name_and_its_spelling():
    rows = dict(re.findall(r"^\| `([\w]+)` \| `([^`]+)` \|", PAGE, re.M))
    assert rows.keys() >= SPELLINGS.keys()
    for name, spelling in SPELLINGS.items():
        assert rows[name] == spelling
    for name, text in rows.items():
        if name not in REFUSED and name in SPELLINGS:
            assert cp.parse(text) == cp.parse(f"kvpress:{name}")
