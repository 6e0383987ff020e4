"""A question to a cache: the pipeline's answer, and the cache as it was."""

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer, pipeline

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from tests.tiny import exact_tiny as tiny
from tests.tiny import tokenizer, tokens, words
from tests.tiny_cache import kept

PRESS = cp.AdaKVPress(cp.KnormPress(0.5))
TEXT = words(40)
pytestmark = pytest.mark.usefixtures("clear_answers")


def read(name="llama", press=PRESS, chat=True):
    """A model, its tokenizer, a cache of the text, and the pipeline."""
    model, made = tiny(name), tokenizer(chat)
    model.generation_config.suppress_tokens = [0, 1, 2, 96]
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=made)
    cache = DynamicCache(config=model.config)
    pipe(TEXT, question="w3", press=press, cache=cache, max_new_tokens=1)
    return model, made, cache, pipe


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next", "gpt2"])
@pytest.mark.parametrize("press", [PRESS, None])
def test_answers_are_those_of_the_pipeline_as_often_as_asked(name, press):
    model, made, cache, pipe = read(name, press)
    before = [[layer._seen for layer in compressed_layers(cache)], cache.get_seq_length()]
    for question, prefix in (("w8 w9", ""), ("w20", "w4"), ("w8 w9", "")):
        how = {"answer_prefix": prefix, "max_new_tokens": 6}
        wanted = pipe(TEXT, question=question, press=press, cache=cp.fork(cache), **how)["answer"]
        assert len(wanted.split()) == 6
        assert cp.ask(model, made, cache, question, **how) == wanted
    assert [[layer._seen for layer in compressed_layers(cache)], cache.get_seq_length()] == before


def test_a_loaded_cache_is_asked_without_its_text(tmp_path):
    model, made, cache, _ = read()
    wanted = cp.ask(model, made, cache, "w8 w9")
    cp.save_cache(cache, tmp_path / "c", model)
    fresh = tiny()
    fresh.generation_config.suppress_tokens = [0, 1, 2, 96]
    loaded = cp.load_cache(tmp_path / "c", fresh)
    assert [cp.ask(fresh, made, loaded, "w8 w9") for _ in range(2)] == [wanted] * 2
    assert kept(loaded) == kept(cache)


def test_the_template_ends_the_question_unless_it_is_left_out():
    model, made, cache, pipe = read()
    plain = {"question": "w8 w9 w5 w6", "max_new_tokens": 5}
    assert cp.ask(model, made, cache, plain["question"], chat=False, max_new_tokens=5) == cp.ask(
        model, made, cache, "w8 w9", max_new_tokens=5
    )
    thought = cp.ask(model, made, cache, "w8", enable_thinking=True, max_new_tokens=5)
    assert thought == cp.ask(model, made, cache, "w8 w5 w8 w6", chat=False, max_new_tokens=5)
    model, made, cache, pipe = read(chat=False)
    wanted = pipe(TEXT, cache=cp.fork(cache), **plain)["answer"]
    assert cp.ask(model, made, cache, plain["question"], max_new_tokens=5) == wanted


def test_an_answer_is_streamed():
    model, made, cache, _ = read()
    streamer = TextIteratorStreamer(made, skip_prompt=True, skip_special_tokens=True)
    answer = cp.ask(model, made, cache, "w8 w9", streamer=streamer, max_new_tokens=7)
    assert "".join(streamer).split() == answer.split() and len(answer.split()) == 7


def test_options_of_generation_reach_it():
    model, made, cache, _ = read()
    greedy = cp.ask(model, made, cache, "w8 w9")
    torch.manual_seed(0)
    drawn = {cp.ask(model, made, cache, "w8 w9", generation={"do_sample": True}) for _ in range(3)}
    assert len(drawn) > 1
    beams = cp.ask(model, made, cache, "w8 w9", generation={"num_beams": 2, "min_new_tokens": 3})
    assert beams and greedy == cp.ask(model, made, cache, "w8 w9")


ODD = [
    {"num_return_sequences": 2, "do_sample": True},
    {"return_dict_in_generate": True},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"max_new_tokens": 3},
    {"prefill_chunk_size": 1},
    {"nothing": 1},
    {"do_sample": True, "temperature": 0.0},
    {"num_beams": 0},
    {"eos_token_id": "x"},
    [1],
]


@pytest.mark.parametrize("options", ODD, ids=str)
def test_options_that_give_no_one_answer_from_the_cache_are_refused(options):
    model, made, cache, pipe = read()
    before = cp.ask(model, made, cache, "w8 w9")
    with pytest.raises(cp.CachepressError, match="^generation") as refused:
        cp.ask(model, made, cache, "w8 w9", generation=options)
    assert "\n" not in str(refused.value)
    assert cp.ask(model, made, cache, "w8 w9", generation={"use_cache": True}) == before
    ours = ("max_new_tokens", "prefill_chunk_size", "nothing")
    ours += ("num_return_sequences", "return_dict_in_generate")
    if isinstance(options, dict) and options.keys().isdisjoint(ours):
        with pytest.raises(cp.CachepressError, match="^generation"):
            pipe(TEXT, question="w8", press=PRESS, **options)


@pytest.mark.parametrize(
    "odd",
    [
        {"use_cache": False},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True},
    ],
    ids=str,
)
def test_what_a_model_says_of_generation_leaves_an_answer_as_it_is(odd):
    model, made, cache, pipe = read()
    wanted = cp.ask(model, made, cache, "w8 w9", max_new_tokens=6)
    for name, value in odd.items():
        setattr(model.generation_config, name, value)
    assert cp.ask(model, made, cache, "w8 w9", max_new_tokens=6) == wanted
    piped = pipe(TEXT, question="w8 w9", cache=cp.fork(cache), max_new_tokens=6)
    assert piped["answer"] == wanted and len(wanted.split()) == 6


def test_what_cannot_be_asked_is_refused():
    model, made, cache, _ = read()
    for question in (None, 5, ["w3"]):
        with pytest.raises(cp.CachepressError, match="question: got .*, wanted a text"):
            cp.ask(model, made, cache, question)
    with pytest.raises(cp.CachepressError, match="question: got '', wanted a text"):
        cp.ask(model, tokenizer(chat=False), cache, "")
    for number in (0, -1, True, 2.0, None):
        with pytest.raises(cp.CachepressError, match="max_new_tokens: got"):
            cp.ask(model, made, cache, "w3", max_new_tokens=number)
    with pytest.raises(cp.CachepressError, match="the cache is empty"):
        cp.ask(model, made, DynamicCache(), "w3")
    two = cp.prefill(model, tokens(20, batch=2), PRESS)
    with pytest.raises(cp.CachepressError, match="holds 2 sequences"):
        cp.ask(model, made, two, "w3")
    with pytest.raises(cp.CachepressError, match="no room for an answer: 42 tokens of text"):
        cp.ask(model, made, cache, "w3", max_new_tokens=500)
