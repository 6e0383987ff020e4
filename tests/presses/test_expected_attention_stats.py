"""Expected attention with learned moments, against the formula written out."""

from dataclasses import replace
from math import exp

import pytest
import torch
from transformers import DynamicCache

import cachepress as cp
from cachepress.artefacts.kept import save_artefact
from cachepress.presses.expected_attention_stats import ExpectedAttentionStatsPress
from tests.bounds import close
from tests.presses.test_snapkv import (
    assert_each_text_is_as_if_alone,
    assert_second_turns_are_as_if_alone,
    recording,
)
from tests.tiny import exact_tiny as tiny
from tests.tiny import randn, tokens
from tests.tiny_cache import forward, kept, pressed


def learned():
    generator = torch.Generator().manual_seed(5)
    mean = randn(4, 2, 2, 8, generator=generator)
    root = randn(4, 2, 2, 8, 8, generator=generator) / 4
    return {"mean": mean.float(), "covariance": (root @ root.mT).float()}


@pytest.fixture(scope="module")
def stats(tmp_path_factory):
    path = tmp_path_factory.mktemp("stats") / "query_stats.safetensors"
    save_artefact(path, "query_stats", learned(), {})
    return str(path)


def rotation(positions):
    """The mean over positions of the rotations of halves of 8 channels, ``[8, 8]``."""
    total = torch.zeros(8, 8, dtype=torch.double)
    for p in positions:
        for i in range(4):
            angle = torch.tensor(p * 10000.0 ** (-i / 4), dtype=torch.double)
            total[i, i] += angle.cos()
            total[i + 4, i + 4] += angle.cos()
            total[i, i + 4] -= angle.sin()
            total[i + 4, i] += angle.sin()
    return total / len(positions)


@pytest.mark.parametrize(("covariance", "vnorm"), [(True, True), (False, True), (True, False)])
def test_scores_are_those_of_the_formula_with_the_learned_moments(stats, covariance, vnorm):
    press, seen = recording(
        ExpectedAttentionStatsPress(
            0.5, 16, 3, use_covariance=covariance, use_vnorm=vnorm, epsilon=0.01, stats=stats
        )
    )
    pressed(tiny(), press, tokens(20))
    step, known = rotation(range(20, 36)), learned()
    for depth in range(4):
        [(view, score)] = seen[depth]
        for h in range(2):
            total = torch.zeros(17, dtype=torch.double)
            for g in range(2):
                mean = step @ known["mean"][depth, h, g].double()
                spread = step @ known["covariance"][depth, h, g].double() @ step.T
                logits = []
                for key in view.keys[0, h, 3:].double():
                    logit = float(mean @ key) / 8**0.5
                    if covariance:
                        logit += float(key @ spread @ key) / 8 / 2
                    logits.append(logit)
                whole = sum(exp(x - max(logits)) for x in logits)
                shares = [exp(x - max(logits)) / whole / 2 for x in logits]
                total += torch.tensor(shares, dtype=torch.double)
            if vnorm:
                total = (total + 0.01) * view.values[0, h, 3:].double().norm(dim=-1)
            close(score[0, h, 3:].double(), total)
            assert score[0, h, :3].min() > 1e38


def test_with_the_moments_of_a_prompt_it_is_expected_attention(tmp_path):
    """The prompt's own moments, learned from it alone, give what they give without a file."""
    inner, seen = recording(cp.ExpectedAttentionPress(0.5, 16))
    wanted = kept(pressed(tiny(), inner, tokens(30)))
    moments = [seen[depth][0][0].moments for depth in range(4)]
    path = tmp_path / "query_stats.safetensors"
    save_artefact(
        path,
        "query_stats",
        {
            "mean": torch.cat([m.mean for m in moments]),
            "covariance": torch.cat([m.covariance for m in moments]),
        },
        {},
    )
    press = ExpectedAttentionStatsPress(0.5, 16, stats=str(path))
    assert kept(pressed(tiny(), press, tokens(30))) == wanted


def test_padding_changes_nothing(stats):
    press = ExpectedAttentionStatsPress(0.5, 16, stats=stats)
    assert_each_text_is_as_if_alone(press)
    assert_second_turns_are_as_if_alone(press)


def test_it_observes_no_query_and_scores_decoded_pairs(stats):
    press = ExpectedAttentionStatsPress(0.5, 16, stats=stats)
    assert not press.needs.queries and press.needs.moments_after is None and press.needs.rotary
    inner, seen = recording(press)
    model, cache = tiny(), DynamicCache()
    with cp.DecodingPress(inner, 2, 12)(model):
        forward(model, cache, input_ids=tokens(20))
        for i in range(2):
            forward(model, cache, input_ids=tokens(1, seed=i))
    view, score = seen[2][-1]
    assert view.next_position.tolist() == [22] and view.keys.shape[2] == 14
    assert torch.equal(score, press.score(view))
    earlier = press.score(replace(view, next_position=view.next_position - 9))
    assert not torch.allclose(score[..., 4:], earlier[..., 4:])


def test_what_does_not_fit_is_refused_before_any_work(stats, tmp_path):
    model, calls = tiny(), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    wrong = tmp_path / "query_stats.safetensors"
    save_artefact(wrong, "query_stats", {"mean": torch.zeros(4, 2, 2, 8)}, {})
    for source, message in (
        (str(tmp_path / "none"), "cachepress train query_stats --model"),
        (str(wrong), "no whole query_stats artefact: covariance is missing"),
    ):
        with pytest.raises(cp.CachepressError, match=message):
            cp.prefill(model, tokens(9), ExpectedAttentionStatsPress(0.5, stats=source))
    with pytest.raises(cp.CachepressError, match="mean is [(]4, 2, 2, 8[)], wanted [(]4, 4, 1, 8"):
        cp.prefill(tiny("gpt2"), tokens(9), ExpectedAttentionStatsPress(0.5, stats=stats))
    assert not calls


def test_the_spelling(stats):
    press = ExpectedAttentionStatsPress(0.5, stats=stats)
    assert cp.parse(repr(press)) == press == press.for_model(tiny())
    assert "stats" not in repr(ExpectedAttentionStatsPress(0.5))
    with pytest.raises(TypeError, match="not made ready"):
        ExpectedAttentionStatsPress(0.5).moments(None)
