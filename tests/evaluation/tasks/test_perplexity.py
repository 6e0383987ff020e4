"""Perplexity: windows of exactly so many tokens, and the likelihood that the model itself gives."""

import json
import math
from dataclasses import replace

import pytest
import torch

import cachepress as cp
from cachepress.evaluation import EvaluationConfig, EvaluationRunner
from cachepress.evaluation.samples import contexts_of, load_table
from tests.bounds import EXACT
from tests.tiny import exact_tiny, tokenizer, words
from tests.tiny_cache import forward


@pytest.fixture
def config(model_dir, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(words(200, seed=5))
    return EvaluationConfig(
        dataset="perplexity",
        data_dir="40-8x4",
        data_path=str(path),
        model=model_dir,
        output_dir=str(tmp_path / "results"),
        device="cpu",
    )


def test_windows_are_spread_over_the_text(config):
    text = words(200, seed=5).split()
    table = load_table(config, tokenizer())
    assert [len(c.split()) for c in table["context"]] == [40] * 4
    for i, (context, answer) in enumerate(zip(table["context"], table["answer"], strict=True)):
        assert context.split() == text[50 * i : 50 * i + 40]
        assert answer[0].split() == text[50 * i + 40 : 50 * i + 48]


def test_it_is_what_one_forward_over_all_says(config, exact_models):
    metrics = EvaluationRunner(config, quiet=True).run_evaluation()
    model, wanted = exact_tiny(), []
    for context in contexts_of(load_table(config, tokenizer())):
        text = f"{context.text} {context.samples[0].answer[0]}"
        ids = torch.tensor([tokenizer()(text).input_ids])
        logits = forward(model, input_ids=ids).logits[0].log_softmax(-1)
        n = ids.shape[1] - 8
        expected = logits[n - 1 : -1].gather(-1, ids[0, n:, None])
        wanted.append(-expected.mean().item())
    assert metrics["perplexity"]["mean"] == pytest.approx(math.exp(sum(wanted) / 4), rel=EXACT)
    assert metrics["perplexity"]["low"] < metrics["perplexity"]["mean"]
    assert metrics["score"] is None and metrics["tasks"] == {}


def test_a_compressed_beginning_changes_it_and_ratio_0_does_not(config, exact_models):
    whole = EvaluationRunner(config, quiet=True).run_evaluation()["perplexity"]["mean"]
    zero, half = (
        EvaluationRunner(replace(config, press="knorm", compression_ratio=ratio), quiet=True)
        for ratio in (0.0, 0.5)
    )
    assert zero.run_evaluation()["perplexity"]["mean"] == pytest.approx(whole, rel=EXACT)
    assert abs(half.run_evaluation()["perplexity"]["mean"] / whole - 1) > 0.01


def local(config, tmp_path, **options):
    """The config with a local file, whose text goes on for 100 of the model's 512 positions."""
    path = tmp_path / "t.jsonl"
    context, text = words(450, seed=7), words(100, seed=8)
    row = {"context": context, "question": "", "answer": text, "metric": "perplexity"}
    path.write_text(json.dumps({**row, "max_new_tokens": 1}))
    return replace(config, dataset=str(path), data_dir=None, data_path=None, **options)


def test_a_text_that_goes_on_beyond_the_trained_length_is_refused(config, tmp_path):
    with pytest.raises(cp.CachepressError, match="has 449 tokens, but there is room for 411:"):
        EvaluationRunner(local(config, tmp_path), quiet=True).run_evaluation()


def test_a_cut_leaves_room_for_the_text_that_goes_on(config, tmp_path):
    whole = local(config, tmp_path, beyond_trained_length=True)
    assert EvaluationRunner(whole, quiet=True).run_evaluation()["context_tokens"] == 449
    cut = local(config, tmp_path, truncation="end")
    metrics = EvaluationRunner(cut, quiet=True).run_evaluation()
    assert (metrics["context_tokens"], metrics["cut_tokens"]) == (411, 38)
    assert metrics["perplexity"]["samples"] == 1


def test_another_text_under_the_same_name_is_read_anew(config, tmp_path):
    first = EvaluationRunner(config, quiet=True).run_evaluation()
    other = tmp_path / "other.txt"
    other.write_text(words(200, seed=6))
    second = EvaluationRunner(replace(config, data_path=str(other)), quiet=True).run_evaluation()
    assert second["perplexity"]["mean"] != first["perplexity"]["mean"]
    again = EvaluationRunner(config, quiet=True).run_evaluation()
    assert again["perplexity"]["mean"] == first["perplexity"]["mean"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("40", "got data_dir='40'"),
        ("40-0x4", "got data_dir='40-0x4'"),
        ("100-8x4", "the text has 200 tokens, and 4 windows of 108 need 432"),
    ],
)
def test_what_cannot_be_is_one_clear_line(config, part, message):
    with pytest.raises(cp.CachepressError, match=message):
        load_table(replace(config, data_dir=part), tokenizer())


def test_a_missing_text_is_named(config):
    with pytest.raises(cp.CachepressError, match="cannot read /nowhere.txt: No such file"):
        load_table(replace(config, data_path="/nowhere.txt"), tokenizer())
