"""A data set that cannot fit is refused before it is generated."""

from dataclasses import replace

import pytest
from transformers import AutoConfig

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.samples import contexts_of, load_table
from cachepress.evaluation.tasks.builtin import generate
from cachepress.generation.prompt import prompt_within
from cachepress.models.loading import positions_of
from tests.tiny import tokenizer


class NoTokenizer:
    """A tokenizer that must not be asked."""

    chat_template = None

    def __call__(self, *args, **options):
        raise AssertionError("nothing may be generated")


def refused(**options):
    with pytest.raises(cp.CachepressError) as caught:
        load_table(EvaluationConfig(**options), NoTokenizer())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "part", "longest", "beside"),
    [
        ("builtin", "multi_key-{n}", "{m}", 4),
        ("builtin", "{n}", "{m}", 4),
        ("needle", "50,{n}x2", "{n}", 11),
        ("needle", "number-{n}x1", "{n}", 11),
        ("perplexity", "{n}-5x2", "{n}", 5),
    ],
)
@pytest.mark.parametrize("limit", ["positions", "max_context_length"])
def test_a_context_longer_than_there_is_room(model_dir, dataset, part, longest, beside, limit):
    positions = positions_of(model_dir)
    assert positions == AutoConfig.from_pretrained(model_dir).max_position_embeddings
    room = positions - beside if limit == "positions" else 60
    options = {} if limit == "positions" else {"max_context_length": 60}
    n = 2 * room
    said = refused(dataset=dataset, data_dir=part.format(n=n), model=model_dir, **options)
    least = longest.format(n=n, m=int(0.95 * n))
    assert f"a context has at least {least} tokens, but there is room for {room}" in said


@pytest.mark.parametrize(
    ("dataset", "most", "limit"),
    [
        ("needle", "{n}x1", 502),
        ("needle", "number-{n}x3", 502),
        ("perplexity", "{n}-100x1", 413),
        ("perplexity", "400-{n}x1", 113),
    ],
)
def test_what_is_asked_and_answered_needs_room_as_well(model_dir, dataset, most, limit):
    assert positions_of(model_dir) == 512
    options = {"dataset": dataset, "model": model_dir}
    said = refused(**options, data_dir=most.format(n=limit))
    assert "beside what is asked and answered" in said
    with pytest.raises(AssertionError, match="nothing may be generated"):
        refused(**options, data_dir=most.format(n=limit - 1))
    said = refused(**options, data_dir=most.format(n=20), max_new_tokens=495)
    assert "beside what is asked and answered" in said


def test_a_cut_does_not_help_where_nothing_is_left(model_dir):
    said = refused(dataset="perplexity", data_dir="5-512x1", model=model_dir, truncation=True)
    assert "there is room for 0 beside what is asked and answered" in said
    with pytest.raises(AssertionError, match="nothing may be generated"):
        refused(dataset="perplexity", data_dir="5-511x1", model=model_dir, truncation=True)


@pytest.mark.parametrize("cut", [{"truncation": True}, {"beyond_trained_length": True}])
@pytest.mark.parametrize(
    ("dataset", "part"),
    [
        ("builtin", str(10**12)),
        ("builtin", f"single_prose-{10**7 + 1}"),
        ("builtin", "9" * 5000),
        ("needle", f"{10**12}x1"),
        ("needle", "50000x3000"),
        ("needle", f"1000,{'9' * 5000}x2"),
        ("perplexity", f"{10**12}-5x1"),
        ("perplexity", f"5-5x{'9' * 5000}"),
    ],
)
def test_more_than_any_run_reads_is_refused_whatever_is_cut(model_dir, dataset, part, cut):
    said = refused(dataset=dataset, data_dir=part, model=model_dir, **cut)
    assert "tokens together, wanted at most 1e+08" in said


@pytest.mark.parametrize(("kind", "most"), [("sentence", 10_000), ("number", 1_000_000)])
def test_more_needles_than_there_are_is_refused(model_dir, kind, most):
    for part in (f"{kind}-50x{most + 1}", f"{kind}-50x{'9' * 5000}"):
        said = refused(dataset="needle", data_dir=part, model=model_dir)
        assert f"wanted at most {most}" in said


@pytest.mark.parametrize("part", ["multi_key-\u00b2", "0x0", "x", "-5"])
def test_what_is_no_length_is_misspelt(model_dir, part):
    for dataset in ("builtin", "needle", "perplexity"):
        assert f"data_dir={part!r}" in refused(dataset=dataset, data_dir=part, model=model_dir)


class Counting:
    """A tokenizer that counts the texts of at least so many words that it is given."""

    def __init__(self, least):
        self.made, self.least, self.texts = tokenizer(chat=False), least, 0
        self.chat_template = None

    def __call__(self, text, **options):
        self.texts += len(text.split()) >= self.least
        return self.made(text, **options)


NARROW = {"dataset": "builtin", "data_dir": "single_repeat-520"}
"""A context has 494 to 520 tokens, where there is room for 512 with its question and its answer."""


def generated(**options):
    made = Counting(least=400)
    with pytest.raises(cp.CachepressError) as caught:
        load_table(EvaluationConfig(**{**NARROW, **options}), made)
    return str(caught.value), made.texts


def test_of_contexts_about_as_long_as_there_is_room_one_is_generated(model_dir):
    said, texts = generated(model=model_dir)
    assert said.startswith("sample 0: the context has 5") and "but there is room for 4" in said
    whole = Counting(least=400)
    table = load_table(
        EvaluationConfig(**NARROW, model=model_dir, beyond_trained_length=True), whole
    )
    assert len(table) == 10 and texts <= whole.texts / 10 + 1
    said, few = generated(model=model_dir, beyond_trained_length=True, max_context_length=505)
    assert "there is room for 505" in said and few <= texts + 1


@pytest.mark.parametrize("part", ["single_repeat-480", "multi_key-440", "variable_tracking-430"])
def test_what_fits_is_never_refused(model_dir, part):
    options = {"dataset": "builtin", "data_dir": part, "model": model_dir}
    for more in ({}, {"fraction": 0.3}, {"query_aware": True}, {"truncation": True}):
        config = EvaluationConfig(**options, **more)
        table = load_table(config, tokenizer())
        for context in contexts_of(table):
            prompt_within(tokenizer(), 512, context.text, context.prompt_options(config))


def test_the_exact_bound_is_that_of_the_reading(model_dir):
    """Among lengths around the room, those pass of which every context can be read."""
    passed = 0
    for length in range(440, 520, 8):
        options = {"dataset": "builtin", "data_dir": f"single_repeat-{length}", "model": model_dir}
        beyond = EvaluationConfig(**options, beyond_trained_length=True)
        within = replace(beyond, beyond_trained_length=False)
        fits = True
        for context in contexts_of(load_table(beyond, tokenizer())):
            try:
                prompt_within(tokenizer(), 512, context.text, context.prompt_options(within))
            except cp.CachepressError:
                fits = False
        if fits:
            load_table(within, tokenizer())
            passed += 1
        else:
            with pytest.raises(cp.CachepressError, match="there is room for"):
                load_table(within, tokenizer())
    assert 0 < passed < 10


def test_a_fraction_may_be_without_the_longest(model_dir):
    options = {"dataset": "needle", "data_dir": "100,2000x1", "model": model_dir}
    with pytest.raises(cp.CachepressError, match="a context has at least 2000 tokens"):
        load_table(EvaluationConfig(**options), tokenizer())
    found = set()
    for seed in range(4):
        config = EvaluationConfig(**options, fraction=0.5, seed=seed)
        found |= {len(x.split()) > 500 for x in load_table(config, tokenizer())["context"]}
    assert found == {True, False}
    with pytest.raises(cp.CachepressError, match="a context has at least 1000 tokens"):
        load_table(
            EvaluationConfig(**{**options, "data_dir": "1000,2000x1"}, fraction=0.5), tokenizer()
        )


def test_positions_are_those_that_the_model_is_loaded_with(model_dir):
    told = {"max_position_embeddings": 600}
    assert positions_of(model_dir, told) == 600
    load_table(EvaluationConfig(**NARROW, model=model_dir, model_kwargs=told), tokenizer())


def test_a_model_that_cannot_be_had_is_left_to_its_loading(tmp_path):
    assert positions_of(str(tmp_path)) is None


def test_generate_refuses_it_too():
    with pytest.raises(cp.CachepressError, match="got 1000000000000, wanted at most 2000000 for"):
        generate(NoTokenizer(), length=10**12)
