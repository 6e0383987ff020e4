"""One context, many questions, one batch: the same answers as one by one."""

import logging

import pytest
import torch
from transformers import DynamicCache, pipeline

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from cachepress.generation.pipeline import TASK
from cachepress.generation.prefill import read_context
from cachepress.generation.prompt import PromptOptions, make_prompt
from tests.bounds import close
from tests.tiny import ARCHITECTURES, exact_tiny, tokenizer, words
from tests.tiny_cache import forward

CONTEXT = words(40)
QUESTIONS = [words(3, seed=1), words(7, seed=2), words(1, seed=3)]
PRESS = cp.KnormPress(0.5)
pytestmark = pytest.mark.usefixtures("clear_answers")


def make_pipe(name="llama", chat=True):
    return pipeline(TASK, model=exact_tiny(name), tokenizer=tokenizer(chat), device=-1)


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


def test_one_question_gives_answer_and_several_give_answers(pipe):
    options = {"press": PRESS, "max_new_tokens": 5, "suppress_tokens": [0, 1, 2, 96]}
    one = pipe(CONTEXT, question=QUESTIONS[0], **options)
    many = pipe(CONTEXT, questions=QUESTIONS, **options)
    assert list(one) == ["answer"]
    assert list(many) == ["answers"]
    assert many["answers"][0] == one["answer"]
    assert len(one["answer"].split()) == 5


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("press", [None, PRESS], ids=str)
def test_a_batch_answers_as_one_by_one(name, press):
    pipe = make_pipe(name)
    options = {"press": press, "max_new_tokens": 6, "suppress_tokens": [0, 1, 2, 96]}
    batch = pipe(CONTEXT, questions=QUESTIONS, **options)["answers"]
    alone = [pipe(CONTEXT, question=q, **options)["answer"] for q in QUESTIONS]
    assert batch == alone


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_batched_logits_equal_one_by_one(name):
    model, words_of = exact_tiny(name), tokenizer()
    prompt = make_prompt(words_of, model, CONTEXT, PromptOptions(questions=QUESTIONS[:2]))
    cache, _ = read_context(model, prompt.context_ids, PRESS)
    seen = cache.get_seq_length()
    short, long = sorted(prompt.question_ids, key=lambda ids: ids.shape[1])
    pad = long.shape[1] - short.shape[1]
    ids = torch.cat([torch.cat([torch.zeros(1, pad, dtype=torch.long), short], -1), long])
    mask = torch.ones(2, seen + long.shape[1], dtype=torch.long)
    mask[0, seen : seen + pad] = 0
    positions = (mask.cumsum(-1) - 1)[:, seen:]
    batch = forward(
        model, cp.fork(cache, 2), input_ids=ids, attention_mask=mask, position_ids=positions
    ).logits
    for row, question in zip(batch, (short, long), strict=True):
        alone = forward(model, cp.fork(cache), input_ids=question).logits[0]
        close(row[-1], alone[-1])


def test_the_context_is_tokenised_apart_from_template_and_question(pipe):
    prompt = make_prompt(
        pipe.tokenizer,
        pipe.model,
        "w10 w11",
        PromptOptions(question=" w20", answer_prefix="w30", enable_thinking=True),
    )
    assert prompt.context_ids.tolist() == [[3, 4, 10, 11]]
    assert prompt.question_ids[0].tolist() == [[20, 5, 8, 6, 30]]


def test_without_a_template_the_text_is_plain():
    pipe = make_pipe(chat=False)
    prompt = make_prompt(pipe.tokenizer, pipe.model, "w10 w11", PromptOptions(question="w20"))
    assert prompt.context_ids.tolist() == [[10, 11]]
    assert prompt.question_ids[0].tolist() == [[20]]


def test_an_empty_question_borrows_the_last_token():
    pipe = make_pipe(chat=False)
    prompt = make_prompt(pipe.tokenizer, pipe.model, "w10 w11", PromptOptions())
    assert prompt.context_ids.tolist() == [[10]]
    assert prompt.question_ids[0].tolist() == [[11]]
    assert (
        len(pipe(CONTEXT, press=PRESS, max_new_tokens=4, suppress_tokens=[0, 1, 2])["answer"]) > 0
    )


def test_lists_of_contexts(pipe):
    other = words(30, seed=9)
    options = {"press": PRESS, "max_new_tokens": 4}
    same = pipe([CONTEXT, other], questions=QUESTIONS[:2], **options)
    assert [len(r["answers"]) for r in same] == [2, 2]
    assert same[1] == pipe(other, questions=QUESTIONS[:2], **options)
    own = pipe([CONTEXT, other], questions=[QUESTIONS[:1], QUESTIONS[1:]], **options)
    assert own[0]["answers"] == same[0]["answers"][:1]
    assert len(own[1]["answers"]) == 2


def test_the_given_cache_keeps_the_compressed_context_and_answers_again(pipe):
    cache = DynamicCache()
    options = {"press": PRESS, "max_new_tokens": 5, "cache": cache, "return_stats": True}
    first = pipe(CONTEXT, question=QUESTIONS[0], **options)
    assert cache.get_seq_length() == 42
    assert compressed_layers(cache)[0].lengths.tolist() == [[21, 21]]
    again = pipe(CONTEXT, question=QUESTIONS[0], **options)
    assert again["answer"] == first["answer"]
    assert again["stats"].prefill_seconds == 0
    with pytest.raises(cp.CachepressError, match="holds 42 tokens but the context has 32"):
        pipe(words(30), question="w9", cache=cache)


@pytest.mark.parametrize("press", [PRESS, cp.DecodingPress(PRESS, 4, target_size=30)], ids=str)
def test_a_press_of_its_own_acts_alone_inside_the_block_of_another(pipe, press):
    options = {"press": press, "max_new_tokens": 12, "suppress_tokens": [0, 1, 2, 96]}
    cache, inner = DynamicCache(), DynamicCache()
    alone = pipe(CONTEXT, questions=QUESTIONS, cache=cache, **options)
    with cp.RandomPress(0.9)(pipe.model):
        inside = pipe(CONTEXT, questions=QUESTIONS, cache=inner, **options)
    assert inside == alone
    for layer, other in zip(compressed_layers(cache), compressed_layers(inner), strict=True):
        assert torch.equal(layer.positions, other.positions)


def test_stats_are_measured(pipe):
    stats = pipe(CONTEXT, questions=QUESTIONS, press=PRESS, max_new_tokens=5, return_stats=True)[
        "stats"
    ]
    assert stats.context_tokens == 42
    assert stats.cache.pairs_held * 2 == stats.cache.pairs_seen == 42 * 2 * 4
    assert stats.cache.bytes_after < stats.cache.bytes_before
    assert stats.decode_tokens == sum(len(text.split()) for text in stats.texts)
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0


def test_limits_and_prefixes_of_each_question(pipe):
    options = {"press": PRESS, "suppress_tokens": [0, 1, 2, 96], "questions": QUESTIONS}
    wide = pipe(CONTEXT, max_new_tokens=8, answer_prefix=["w9", "w8", "w7"], **options)["answers"]
    cut = pipe(CONTEXT, max_new_tokens=[2, 5, 3], answer_prefix=["w9", "w8", "w7"], **options)
    assert [len(text.split()) for text in cut["answers"]] == [2, 5, 3]
    assert all(a.startswith(b) for a, b in zip(wide, cut["answers"], strict=True))


def test_generation_options_pass(pipe):
    options = {
        "question": QUESTIONS[1],
        "press": PRESS,
        "max_new_tokens": 9,
        "suppress_tokens": [0, 1, 2, 96],
    }
    greedy = pipe(CONTEXT, **options)["answer"]
    torch.manual_seed(1)
    sampled = pipe(CONTEXT, do_sample=True, temperature=5.0, **options)["answer"]
    assert sampled != greedy
    stop = greedy.split()[2]
    stopped = pipe(CONTEXT, stop_strings=[stop], **options)["answer"]
    assert stopped == " ".join(greedy.split()[: greedy.split().index(stop) + 1])


def test_too_long_a_context_is_an_error_or_is_cut_and_said(pipe, caplog):
    with pytest.raises(cp.CachepressError, match="has 42 tokens, but there is room for 20"):
        pipe(CONTEXT, question="w9", max_context_length=20)
    with caplog.at_level(logging.WARNING):
        pipe(CONTEXT, question="w9", max_context_length=20, truncation=True, max_new_tokens=2)
    assert "context cut from 42 to 20 tokens: the end is gone" in caplog.text
    with pytest.raises(cp.CachepressError, match="has 602 tokens, but there is room for 459"):
        pipe(words(600), question="w9")


IDS = [int(word[1:]) for word in CONTEXT.split()]
ASKED = "w7 w8 w9"
SUFFIX = {"context": CONTEXT + ASKED, "suffix": ASKED}
SEPARATOR = {"separator": " w50 w51"}
CUTS = [
    ({"truncation": True}, [3, 4, *IDS[:18]], 22),
    ({"truncation": "end"}, [3, 4, *IDS[:18]], 22),
    ({"truncation": "middle"}, [3, 4, *IDS[:9], *IDS[-9:]], 22),
    ({"truncation": "middle", "chat": False}, [*IDS[:10], *IDS[-10:]], 20),
    (
        {"truncation": "middle", "chat": False, "max_context_length": 21},
        [*IDS[:11], *IDS[-10:]],
        19,
    ),
    ({"truncation": "end", **SEPARATOR}, [3, 4, *IDS[:16], 50, 51], 24),
    ({"truncation": "middle", **SEPARATOR}, [3, 4, *IDS[:8], 50, 51, *IDS[-8:]], 24),
    ({"truncation": "end", **SUFFIX}, [3, 4, *IDS[:15], 7, 8, 9], 25),
    ({"truncation": "end", **SUFFIX, **SEPARATOR}, [3, 4, *IDS[:13], 50, 51, 7, 8, 9], 27),
    ({"truncation": "middle", **SUFFIX}, [3, 4, *IDS[:9], *IDS[-6:], 7, 8, 9], 25),
    (
        {"truncation": "middle", **SUFFIX, "max_context_length": 7},
        [3, 4, *IDS[:2], 7, 8, 9],
        38,
    ),
    ({"truncation": True, "max_context_length": 42, **SEPARATOR}, [3, 4, *IDS], 0),
    ({"truncation": False, "max_context_length": 45, **SUFFIX}, [3, 4, *IDS, 7, 8, 9], 0),
]


@pytest.mark.parametrize(("options", "ids", "cut"), CUTS)
def test_what_is_left_of_a_context_that_is_cut(options, ids, cut):
    options = {"question": "w9", "max_context_length": 20, **options}
    context = options.pop("context", CONTEXT)
    prompt = make_prompt(tokenizer(), exact_tiny(), context, PromptOptions(**options))
    assert prompt.context_ids.tolist() == [ids]
    assert prompt.cut == cut


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("length", [11, 19, 20, 31])
@pytest.mark.parametrize("asked", [" w9", " w9 w8 w7 w6", " w9" * 7])
def test_the_halves_are_of_the_whole_prompt_as_benchmarks_cut_it(asked, length, chat):
    options = {"truncation": "middle", "max_context_length": length, "chat": chat}
    question = [int(word[1:]) for word in asked.split()]
    prompt, fixed = [*IDS, *question], 2 * chat
    n = length - fixed + len(question)
    head, tail = prompt[: n // 2], prompt[n // 2 - n :][: -len(question)]
    assert len(tail) <= len(head)
    for given in (
        {"question": asked},
        {"answer_prefix": asked},
        {"questions": [f"{asked} w5 w4", asked]},
    ):
        cut = make_prompt(tokenizer(), exact_tiny(), CONTEXT, PromptOptions(**given, **options))
        assert cut.context_ids[0, fixed:].tolist() == [*head, *tail]
        assert cut.cut == len(IDS) - len(head) - len(tail)


def test_a_question_longer_than_half_the_prompt_leaves_the_beginning_of_the_context():
    options = PromptOptions("w9 " * 20, truncation="middle", max_context_length=11, chat=False)
    assert make_prompt(tokenizer(), exact_tiny(), CONTEXT, options).context_ids.tolist() == [
        IDS[:11]
    ]


@pytest.mark.parametrize(("limit", "room"), [(5, 501), (20, 490)])
def test_texts_that_are_put_into_the_models_mouth_need_room(limit, room):
    forced = {"questions": ["w9", "w9 w8"], "forced": ["", words(9, seed=0)]}
    options = PromptOptions(**forced, max_new_tokens=limit, chat=False)
    assert exact_tiny().config.max_position_embeddings == 512
    prompt = make_prompt(tokenizer(), exact_tiny(), words(room, seed=0), options)
    assert [ids.shape[1] for ids in (prompt.context_ids, *prompt.question_ids)] == [room, 1, 2]
    with pytest.raises(cp.CachepressError, match=f"has {room + 1} tokens, .* room for {room}:"):
        make_prompt(tokenizer(), exact_tiny(), words(room + 1, seed=0), options)


def test_a_cut_context_without_a_question_lends_the_last_token_that_is_left():
    options = PromptOptions(max_context_length=19, truncation="middle", chat=False)
    prompt = make_prompt(tokenizer(), exact_tiny(), CONTEXT, options)
    assert prompt.context_ids.tolist() == [[*IDS[:10], *IDS[-10:-1]]]
    assert [ids.tolist() for ids in prompt.question_ids] == [[[IDS[-1]]]]
    options = PromptOptions(max_context_length=19, truncation="end", chat=False)
    prompt = make_prompt(tokenizer(), exact_tiny(), CONTEXT, options)
    assert prompt.context_ids.tolist() == [IDS[:19]]
    assert [ids.tolist() for ids in prompt.question_ids] == [[[IDS[19]]]]


@pytest.mark.parametrize(("way", "place"), [("middle", "the middle"), ("end", "the end")])
def test_a_cut_is_said_and_counted(pipe, caplog, way, place):
    options = {"max_context_length": 20, "truncation": way, "max_new_tokens": 2, **SEPARATOR}
    with caplog.at_level(logging.WARNING):
        stats = pipe(CONTEXT, question="w9", return_stats=True, **options)["stats"]
    assert f"context cut from 42 to 20 tokens: {place} is gone" in caplog.text
    assert (stats.context_tokens, stats.cut_tokens) == (20, 24)


@pytest.mark.parametrize(
    ("context", "options", "message"),
    [
        ("", {}, "the context is empty"),
        (CONTEXT, {"truncation": "left"}, "truncation: got 'left', wanted 'middle', 'end'"),
        (CONTEXT, {"suffix": "w1 w2"}, "does not end with the suffix 'w1 w2'"),
        (
            CONTEXT + ASKED,
            {"truncation": "end", "suffix": ASKED, "max_context_length": 5},
            "no room for a context: 5 tokens are allowed, and what a cut spares .* takes 5",
        ),
        ("  \n", {}, "the context is empty"),
        (CONTEXT, {"question": "w9", "questions": ["w9"]}, "both question and questions"),
        (CONTEXT, {"questions": []}, "questions: got"),
        (CONTEXT, {"questions": "w9"}, "questions: got 'w9'"),
        (CONTEXT, {"max_new_tokens": 0}, "max_new_tokens: got 0"),
        (CONTEXT, {"questions": ["w9"], "max_new_tokens": [1, 2]}, "got 2 for 1 questions"),
        (CONTEXT, {"temprature": 1.0}, "unknown option 'temprature'"),
        (CONTEXT, {"max_context_length": 0}, "max_context_length: got 0, wanted a whole number"),
        (CONTEXT, {"max_new_tokens": 600}, "no room for a context"),
        ([CONTEXT], {"questions": [["w9"], ["w8"]]}, "2 lists of questions"),
    ],
)
def test_bad_input_is_one_clear_line(pipe, context, options, message):
    with pytest.raises(cp.CachepressError, match=message) as caught:
        pipe(context, **options)
    assert "\n" not in str(caught.value)
