import pytest
import torch
from transformers import DynamicCache, pipeline

import cachepress as cp
from cachepress.presses.finch import FinchPress
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokenizer, tokens, words
from tests.tiny_cache import forward, kept


def reference(ids, question, n_kept, normalize=True, chunk=None):
    """Pairs that each head keeps, from whole attention matrices."""
    model = tiny()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    n, found = ids.shape[1], []
    for layer in attentions:
        heads = []
        for head in range(2):
            score = [0.0] * n
            for q in range(n - question, n):
                for row in range(q + 1):
                    for group in range(2):
                        weight = float(layer[0, 2 * head + group, q, row])
                        score[row] += weight * (q + 1 if normalize else 1)
            for row in range(n - question, n):
                score[row] = 1e6 + row
            rows, spent = [], 0
            for start in range(0, n, chunk or n):
                stop = min(start + (chunk or n), n)
                share = n_kept * stop // n
                best = sorted(range(start, stop), key=lambda r: -score[r])
                rows += sorted(best[: share - spent])
                spent = share
            heads.append(rows)
        found.append([heads])
    return found


@pytest.mark.parametrize("options", [{}, {"normalize_scores": False}, {"chunk_length": 15}])
def test_keeps_what_the_question_attends_to(options):
    ids = tokens(40)
    press = FinchPress(0.5, rerotate_keys=False, **options)
    cache = cp.prefill(tiny(), ids, press, question=7)
    normalize, chunk = options.get("normalize_scores", True), options.get("chunk_length")
    assert kept(cache) == reference(ids, 7, 20, normalize, chunk)


def test_the_question_of_each_sequence_is_its_own():
    press = FinchPress(0.5)
    texts, lengths = [tokens(n, seed=n) for n in (40, 23)], [9, 3]
    ids = torch.zeros(2, 40, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[40 - text.shape[1] :] = text[0]
    batch = cp.prefill(tiny(), ids, press, attention_mask=(ids > 0).long(), question=lengths)
    for b, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        alone = kept(cp.prefill(tiny(), text, press, question=length, chunk_size=8))
        pad = 40 - text.shape[1]
        for layer, layer_alone in zip(kept(batch), alone, strict=True):
            assert [[p - pad for p in head] for head in layer[b]] == layer_alone[0]


def test_the_pipeline_marks_each_question():
    pipe = pipeline("kv-press-text-generation", model=tiny(), tokenizer=tokenizer())
    context, asked = words(60), [words(5, seed=1), words(9, seed=2)]
    options = {"max_new_tokens": 4, "return_stats": True}
    both = pipe(context, questions=asked, press=FinchPress(0.5), **options)
    alone = [pipe(context, question=q, press=FinchPress(0.5), **options) for q in asked]
    assert both["answers"] == [one["answer"] for one in alone]
    # Two words before the context and two after the question; the last one starts the answer.
    sizes = [(one["stats"].cache.pairs_seen, one["stats"].cache.pairs_held) for one in alone]
    assert sizes == [(8 * n, 8 * (n // 2)) for n in (2 + 60 + 5 + 1, 2 + 60 + 9 + 1)]


def test_without_a_question_it_is_refused_before_any_work():
    pipe = pipeline("kv-press-text-generation", model=tiny(), tokenizer=tokenizer())
    with pytest.raises(cp.CachepressError, match="chooses by the question, and there is none"):
        pipe(words(20), question=" ", press=FinchPress(0.5))
    with pytest.raises(cp.CachepressError, match="needs a cache for each question"):
        pipe(words(20), questions=["w3", "w4"], press=FinchPress(0.5), cache=DynamicCache())
    with pytest.raises(cp.CachepressError, match="give press.model, question=n"):
        FinchPress(0.5)(tiny())


@pytest.mark.parametrize("question", [0, -1, [], [3, 0], "four"])
def test_bad_questions(question):
    with pytest.raises(cp.CachepressError, match="question: got"):
        FinchPress(0.5)(tiny(), question=question)


def test_numbers_must_fit_the_batch():
    model = tiny()
    with (
        pytest.raises(cp.CachepressError, match="got 2 numbers for 1 sequences"),
        FinchPress(0.5)(model, question=[2, 3]),
    ):
        forward(model, DynamicCache(), input_ids=tokens(12))


def test_bad_options():
    with pytest.raises(cp.CachepressError, match="chunk_length: got 0"):
        FinchPress(0.5, chunk_length=0)
