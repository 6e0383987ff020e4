"""A data set that cannot fit is refused before it is generated."""

import pytest
from transformers import AutoConfig

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.samples import load_table
from cachepress.evaluation.tasks.builtin import generate
from cachepress.models import positions_of


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


def test_a_model_that_cannot_be_had_is_left_to_its_loading(tmp_path):
    assert positions_of(str(tmp_path)) is None


def test_generate_refuses_it_too():
    with pytest.raises(cp.CachepressError, match="got 1000000000000, wanted at most 2000000 for"):
        generate(NoTokenizer(), length=10**12)
