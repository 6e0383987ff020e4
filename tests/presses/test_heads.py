"""Scores of heads against transformers' own attention weights."""

import gc
import json

import numpy as np
import pytest
import torch

import cachepress as cp
from cachepress.presses import _heads
from cachepress.presses._heads import (
    checked,
    copying_scores,
    far_scores,
    fitted,
    read_scores,
)
from tests.bounds import EXACT
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokens
from tests.tiny_cache import forward

FULL = {"llama": range(4), "gpt2": range(4), "gemma2": (1, 3), "gpt_oss": (1, 3)}
T = 512


def weights_on_the_text(name):
    """The text, and the attention weights of each full-attention layer, ``[heads, T, T]``."""
    model = tiny(name)
    model.set_attn_implementation("eager")
    ids = _heads._text(model.get_decoder(), _heads._PASSAGE)
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    return ids[0].tolist(), [weights[i][0] for i in FULL[name]]


@pytest.mark.parametrize("name", FULL)
def test_scores_are_attention_to_what_comes_next_and_to_what_is_far(name):
    ids, layers = weights_on_the_text(name)
    assert len(ids) == T and ids[3 * T // 4 :] == ids[T // 4 : T // 2]
    copying, far = copying_scores(tiny(name)), far_scores(tiny(name), 5, 20)
    groups = 1 if name == "gpt2" else 2
    for weights, ours, ours_far in zip(layers, copying, far, strict=True):
        for h in range(4 // groups):
            heads = range(h * groups, (h + 1) * groups)
            copied = [
                float(weights[k, q, c + 1])
                for k in heads
                for q in range(3 * T // 4, T - 1)
                for c in [q - T // 2]
                if ids[c] == ids[q] and ids[c + 1] == ids[q + 1]
            ]
            assert len(copied) == groups * (T // 4 - 1)
            assert ours[h] == pytest.approx(sum(copied) / len(copied), abs=EXACT, rel=EXACT)
            between = [
                float(weights[k, q, 5 : q - 20 + 1].sum())
                for k in heads
                for q in range(3 * T // 4, T)
            ]
            assert ours_far[h] == pytest.approx(sum(between) / len(between), abs=EXACT, rel=EXACT)


def test_windows_are_at_most_a_quarter_of_what_the_model_can_read():
    model = tiny()
    assert far_scores(model, 10_000, 10_000) == far_scores(model, 128, 128)
    assert far_scores(model, 5, 128) != far_scores(model, 128, 128)


def test_a_large_vocabulary_gives_tokens_that_differ():
    decoder = tiny().get_decoder()
    decoder.config.vocab_size, decoder.config.max_position_embeddings = 5000, 10**6
    decoder.config.eos_token_id = [2, 4999, 17]
    ids = _heads._text(decoder, 300)[0].tolist()
    assert len(ids) == 1200 and ids[900:] == ids[300:600]
    assert len(set(ids)) == 900 and not {0, 2, 17, 4999} & set(ids) and ids.index(1) == 0
    assert _heads._text(decoder, 300)[0].tolist() == ids
    assert len(_heads._text(decoder, 64)[0]) == 256


def test_scores_are_found_once_for_a_model_and_forgotten_with_it():
    model = tiny()
    plain = forward(model, input_ids=tokens(20)).logits
    first, calls = copying_scores(model), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert copying_scores(model) is first and not calls
    assert copying_scores(tiny()) == first
    assert torch.equal(forward(model, input_ids=tokens(20)).logits, plain)
    decoder = model.get_decoder()
    assert decoder in _heads._FOUND
    count = len(_heads._FOUND)
    del model, decoder
    gc.collect()
    assert len(_heads._FOUND) < count


def test_observing_does_not_disturb_a_press_that_is_active():
    model, ids = tiny(), tokens(30)
    with cp.KnormPress(0.5)(model):
        scores = copying_scores(model)
        cache = forward(model, input_ids=ids).past_key_values
    assert cache.layers[0].lengths.tolist() == [[15, 15]]
    assert scores == copying_scores(tiny())


def test_files_are_read_or_refused(tmp_path):
    file = tmp_path / "full_attention_heads.tsv"
    file.write_text("\ufeff1.000000000000000000e+00\t5.0e-01\n\n0\t2.5e-01\n")
    assert read_scores(str(file), "pattern") == ((1.0, 0.5), (0.0, 0.25))
    assert read_scores(str(tmp_path), "pattern") == ((1.0, 0.5), (0.0, 0.25))
    with pytest.raises(cp.CachepressError, match="pattern: got .*nowhere.*No such file"):
        read_scores(str(tmp_path / "nowhere"), "pattern")
    for text, message in (
        ("0.5\tabc\n", "is no table of numbers"),
        ("", "wanted a number of at least 0"),
        ("0.5\tnan\n", "wanted a number of at least 0"),
        ("0.5\t-1\n", "wanted a number of at least 0"),
    ):
        file.write_text(text)
        with pytest.raises(cp.CachepressError, match=message):
            read_scores(str(file), "pattern")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(cp.CachepressError, match="is no table of numbers"):
        read_scores(str(file), "pattern")


def test_tables_of_another_shape_are_refused():
    assert checked([[1, 0.5], [0, 2]], "scores") == ((1, 0.5), (0, 2))
    for bad in ((), ((),), ((0.5, "x"),), 7, ((0.5, float("inf")),), (0.5, 0.5)):
        with pytest.raises(cp.CachepressError, match="scores: wanted a number"):
            checked(bad, "scores")
    fitted(((1, 2),) * 4, tiny(), "scores")
    fitted(((1, 2),) * 2, tiny("gpt_oss"), "scores")
    with pytest.raises(
        cp.CachepressError,
        match="scores: got scores of 3 layers of 8 KV heads, and Llama.* has 4 layers of 2",
    ):
        fitted(((1,) * 8,) * 3, tiny(), "scores")
    with pytest.raises(cp.CachepressError, match="4 layers of 1 to 2 KV heads"):
        fitted(((1,), (1, 2), (1, 2), (1, 2)), tiny(), "scores")


def test_a_model_that_cannot_be_compressed_is_refused():
    with pytest.raises(cp.UnsupportedError):
        copying_scores(torch.nn.Linear(2, 2))


ROWS = [[0.5, 0.25], [1.0, 0.0], [0.75, 2.0], [0.125, 3.0]]
SAMPLES = {
    f"{i}-{j}": [x - 0.125, x + 0.125] for i, row in enumerate(ROWS) for j, x in enumerate(row)
}


@pytest.mark.parametrize("layout", ["tsv", "json", "named", "npy"])
def test_the_layouts_of_a_file_of_scores(tmp_path, layout):
    path = tmp_path / "scores"
    if layout == "npy":
        with path.open("wb") as file:
            np.save(file, np.array(ROWS))
    elif layout == "tsv":
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in ROWS))
    else:
        path.write_text(json.dumps(ROWS if layout == "json" else SAMPLES))
    assert read_scores(str(path), "scores") == tuple(map(tuple, ROWS))


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"0-0": [1], "2-0": [1]}',
        b'{"0-0": [1], "0-2": [1]}',
        b'{"0-0": []}',
        b'{"0-0": {"a": 1}}',
        b'{"0": 1}',
        b"{}",
        b"[]",
        b"[[]]",
        b"[[NaN]]",
        b"[[1e999]]",
        b'[["0.5"]]',
        b"[[1" + b"0" * 500 + b"]]",
        b'{"0-0": 1' + b"0" * 500 + b"}",
        b"a: 1\n",
        b"- [0.5, 0.5]\n",
        b"\x93NUMPY\x01\x00",
        b"\xff\xfe",
        b"",
        b"0.5,0.5\n",
    ],
)
def test_a_file_that_is_no_table_of_scores_is_one_line(tmp_path, content):
    path = tmp_path / "scores"
    path.write_bytes(content)
    for press in (
        cp.HeadKVPress(cp.SnapKVPress(0.5), str(path)),
        cp.DuoAttentionPress(0.5, str(path)),
    ):
        with pytest.raises(cp.CachepressError, match="^(scores|pattern): ") as error:
            press.for_model(tiny())
        assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_an_array_of_objects_is_never_unpickled(tmp_path):
    with (tmp_path / "scores").open("wb") as file:
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(cp.CachepressError, match="is no table of numbers"):
        read_scores(str(tmp_path / "scores"), "scores")


def test_scores_of_query_heads_are_averaged_and_layers_that_slide_left_out():
    rows = tuple((float(i), i + 1.0, i + 2.0, i + 4.0) for i in range(4))
    wanted = tuple((i + 0.5, i + 3.0) for i in range(4))
    assert fitted(rows, tiny(), "scores", by_query=True) == wanted
    assert fitted(rows, tiny("gpt_oss"), "scores", by_query=True) == (wanted[1], wanted[3])
    assert fitted(rows[:2], tiny("gpt_oss"), "scores", by_query=True) == wanted[:2]
    assert fitted(wanted, tiny("gpt_oss"), "pattern") == (wanted[1], wanted[3])
    with pytest.raises(cp.CachepressError, match="got scores of 2 layers of 4 KV heads"):
        fitted(rows[:2], tiny(), "scores", by_query=True)
    with pytest.raises(cp.CachepressError, match="got scores of 4 layers of 4 KV heads"):
        fitted(rows, tiny(), "pattern")
