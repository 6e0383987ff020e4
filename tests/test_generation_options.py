"""Every option of transformers' GenerationConfig in the pipeline: it works, or says why not."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, TextStreamer, WatermarkingConfig, pipeline
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

import cachepress as cp
from cachepress.hf import cache_argument
from tests.tiny import exact_tiny, tiny, tokenizer, words

CONTEXT = words(40)
QUESTIONS = [words(3, seed=1), words(7, seed=2), words(3, seed=3)]
PRESS = cp.KnormPress(0.5)
COUNTS = "counts the tokens of the prompt"
ASSISTANT = "needs an assistant model"
HUB = "moved it to the Hub"
ENCODERS = "for encoder-decoder models"
GIVEN = "the cache is given"
LOOKUP = None if hasattr(Cache, "activate_past_recording") else "needs a later version"
OPTIONS: dict[str, tuple[dict[str, object], str | None]] = {
    "max_length": ({"max_length": 90}, COUNTS),
    "max_new_tokens": ({"max_new_tokens": 3}, None),
    "min_length": ({"min_length": 90}, COUNTS),
    "min_new_tokens": ({"min_new_tokens": 6}, None),
    "early_stopping": ({"early_stopping": True, "num_beams": 3}, None),
    "max_time": ({"max_time": 60.0}, None),
    "stop_strings": ({"stop_strings": ["w7", "w9"]}, None),
    "do_sample": ({"do_sample": True}, None),
    "num_beams": ({"num_beams": 3}, None),
    "use_mtp": ({"use_mtp": True}, ASSISTANT),
    "use_cache": ({"use_cache": False}, "answers come from the cache"),
    "cache_implementation": ({"cache_implementation": "static"}, GIVEN),
    "cache_config": ({"cache_config": {"nbits": 4}}, GIVEN),
    "max_cache_len": ({"max_cache_len": 99}, GIVEN),
    "temperature": ({"temperature": 5.0, "do_sample": True}, None),
    "top_k": ({"top_k": 3, "do_sample": True}, None),
    "top_p": ({"top_p": 0.5, "do_sample": True}, None),
    "min_p": ({"min_p": 0.1, "do_sample": True}, None),
    "top_h": ({"top_h": 0.5, "do_sample": True}, None),
    "typical_p": ({"typical_p": 0.5, "do_sample": True}, None),
    "epsilon_cutoff": ({"epsilon_cutoff": 0.001, "do_sample": True}, None),
    "eta_cutoff": ({"eta_cutoff": 0.001, "do_sample": True}, None),
    "repetition_penalty": ({"repetition_penalty": 3.0}, None),
    "encoder_repetition_penalty": ({"encoder_repetition_penalty": 3.0}, None),
    "length_penalty": ({"length_penalty": 2.0, "num_beams": 3}, None),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 1}, None),
    "encoder_no_repeat_ngram_size": ({"encoder_no_repeat_ngram_size": 1}, None),
    "bad_words_ids": ({"bad_words_ids": [[7], [8, 9]]}, None),
    "renormalize_logits": ({"renormalize_logits": True, "do_sample": True}, None),
    "forced_bos_token_id": ({"forced_bos_token_id": 7}, ENCODERS),
    "forced_eos_token_id": ({"forced_eos_token_id": 2}, None),
    "remove_invalid_values": ({"remove_invalid_values": True}, None),
    "exponential_decay_length_penalty": ({"exponential_decay_length_penalty": (2, 1.5)}, None),
    "suppress_tokens": ({"suppress_tokens": [5, 6]}, None),
    "begin_suppress_tokens": ({"begin_suppress_tokens": [5, 6]}, None),
    "sequence_bias": ({"sequence_bias": [[[7], 3.0]]}, None),
    "token_healing": ({"token_healing": True}, "would change the end of the prompt"),
    "guidance_scale": ({"guidance_scale": 2.0}, None),
    "watermarking_config": ({"watermarking_config": WatermarkingConfig(bias=5.0)}, None),
    "num_return_sequences": ({"num_return_sequences": 2, "do_sample": True}, None),
    "output_attentions": ({"output_attentions": True, "return_dict_in_generate": True}, None),
    "output_hidden_states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        None,
    ),
    "output_scores": ({"output_scores": True, "return_dict_in_generate": True}, None),
    "output_logits": ({"output_logits": True, "return_dict_in_generate": True}, None),
    "return_dict_in_generate": ({"return_dict_in_generate": True}, None),
    "pad_token_id": ({"pad_token_id": 3}, None),
    "bos_token_id": ({"bos_token_id": 3}, None),
    "eos_token_id": ({"eos_token_id": [2, 7]}, None),
    "decoder_start_token_id": ({"decoder_start_token_id": 3}, ENCODERS),
    "is_assistant": ({"is_assistant": True}, ASSISTANT),
    "num_assistant_tokens": ({"num_assistant_tokens": 3}, ASSISTANT),
    "num_assistant_tokens_schedule": ({"num_assistant_tokens_schedule": "heuristic"}, ASSISTANT),
    "assistant_confidence_threshold": ({"assistant_confidence_threshold": 0.5}, ASSISTANT),
    "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 3}, LOOKUP),
    "max_matching_ngram_size": (
        {"max_matching_ngram_size": 1, "prompt_lookup_num_tokens": 3},
        LOOKUP,
    ),
    "assistant_early_exit": ({"assistant_early_exit": 2}, ASSISTANT),
    "assistant_lookbehind": ({"assistant_lookbehind": 3}, ASSISTANT),
    "target_lookbehind": ({"target_lookbehind": 3}, ASSISTANT),
    "assistant_ensemble_weight": ({"assistant_ensemble_weight": 0.5}, ASSISTANT),
    "speculation_type": ({"speculation_type": "dflash"}, ASSISTANT),
    "compile_config": ({"compile_config": {}}, "is not compiled with the model"),
    "disable_compile": ({"disable_compile": True}, None),
    "continuous_batching_config": ({"continuous_batching_config": {}}, r"for generate_batch\(\)"),
    "low_memory": ({"low_memory": True}, HUB),
    "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, HUB),
    "dola_layers": ({"dola_layers": "high"}, HUB),
    "diversity_penalty": ({"diversity_penalty": 0.5}, HUB),
    "num_beam_groups": ({"num_beam_groups": 2}, HUB),
    "constraints": ({"constraints": []}, HUB),
    "force_words_ids": ({"force_words_ids": [[7]]}, HUB),
    "prefill_chunk_size": ({"prefill_chunk_size": 16}, None),
    "transformers_version": ({"transformers_version": "5"}, "changes nothing"),
}
"""A value of each option other than its default, what it needs besides, and what it is told."""
KNOWN = sorted(x for x in GenerationConfig().to_dict() if not x.startswith("_"))
BEYOND = {"guidance_scale"}
"""Options that make forwards of their own, without the text before the last token."""


def make_pipe(model):
    return pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer(), device=-1)


@pytest.fixture(scope="module")
def pipe():
    model = exact_tiny()
    model.set_attn_implementation("eager")
    return make_pipe(model)


def test_the_table_has_every_option():
    assert set(KNOWN) <= set(OPTIONS)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("several", [False, True])
def test_an_option_works_or_says_why_not(pipe, name, several):
    options, refusal = OPTIONS[name]
    asked = {"questions": QUESTIONS} if several else {"question": QUESTIONS[0]}
    given = {"max_new_tokens": 5, **asked, "press": PRESS, **options}
    torch.manual_seed(0)
    if refusal is not None:
        with pytest.raises(cp.CachepressError, match=refusal) as caught:
            pipe(CONTEXT, **given)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value) or "prompt_lookup_num_tokens" in str(caught.value)
        return
    found = pipe(CONTEXT, **given)
    answers = found["answers"] if several else [found["answer"]]
    assert len(answers) == (3 if several else 1)
    each = options.get("num_return_sequences", 1)
    for answer in answers:
        texts = answer if each > 1 else [answer]
        assert len(texts) == each
        assert all(isinstance(x, str) and len(x.split()) <= 6 for x in texts)
    outputs = found.get("outputs", [found.get("output")])
    if options.get("return_dict_in_generate"):
        assert len(outputs) == len(answers)
        kind = name.removeprefix("output_") if name.startswith("output_") else "sequences"
        assert all(output[kind] is not None for output in outputs)
    else:
        assert not found.keys() & {"output", "outputs"}


@pytest.mark.parametrize("name", [x for x in KNOWN if OPTIONS[x][1] is None and x not in BEYOND])
def test_it_is_what_generate_gives_for_the_whole_text(pipe, name):
    """At ratio 0, from transformers' own generate() and cache, with context and question."""
    options = {k: x for k, x in OPTIONS[name][0].items() if k != "prefill_chunk_size"}
    options = {"max_new_tokens": 5, **options, "return_dict_in_generate": False}
    options = {k: x for k, x in options.items() if not k.startswith("output_")}
    model, words_of = pipe.model, pipe.tokenizer
    for question in QUESTIONS:
        torch.manual_seed(0)
        ours = pipe(CONTEXT, question=question, press=cp.KnormPress(0.0), **options)["answer"]
        text = words_of.apply_chat_template(
            [{"role": "user", "content": CONTEXT + " " + question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = words_of(text, return_tensors="pt", add_special_tokens=False).input_ids
        torch.manual_seed(0)
        how = {"do_sample": False, "pad_token_id": 0, **options}
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(**how),
            tokenizer=words_of if "stop_strings" in how else None,
        )
        wanted = [words_of.decode(x[ids.shape[1] :], skip_special_tokens=True) for x in out]
        if "eos_token_id" in options:
            wanted = [x.removesuffix("w7").strip() for x in wanted]
        assert (ours if isinstance(ours, list) else [ours]) == wanted


def test_several_answers_of_several_questions_are_lists(pipe):
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 4, "press": PRESS}
    found = pipe(CONTEXT, questions=QUESTIONS, return_stats=True, **options)
    alone = [pipe(CONTEXT, question=q, **options)["answer"] for q in QUESTIONS]
    assert found["answers"] == alone
    assert [len(set(answer)) for answer in alone] == [3, 3, 3]
    stats = found["stats"]
    assert stats.texts == [text for answer in alone for text in answer]
    assert len(stats.tokens) == 9


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next", "gpt2"])
@pytest.mark.parametrize(
    "press", [None, PRESS, cp.AdaKVPress(PRESS), cp.DecodingPress(PRESS, 4, 12)]
)
def test_beams_of_several_questions_are_those_of_each(name, press):
    made = make_pipe(exact_tiny(name))
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "press": press}
    options["suppress_tokens"] = [0, 1, 2, 96]
    found = made(CONTEXT, questions=QUESTIONS, **options)["answers"]
    assert found == [made(CONTEXT, question=q, **options)["answer"] for q in QUESTIONS]


def test_outputs_are_those_of_transformers(pipe):
    cache = DynamicCache()
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 4}
    found = pipe(CONTEXT, question=QUESTIONS[0], press=PRESS, cache=cache, **options)
    output = found["output"]
    new = output.sequences[0, -len(output.logits) :]
    assert [int(x.argmax()) for x in output.logits] == new.tolist()
    held = output.get(cache_argument(pipe.model))
    assert held.get_seq_length() == output.sequences.shape[1] + cache.get_seq_length() - 1 or (
        held.get_seq_length() == output.sequences.shape[1] - 1
    )


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}])
def test_a_streamer_gets_the_question_and_its_answer(pipe, options):
    heard = Heard()
    found = pipe(
        CONTEXT,
        question="w9 w8",
        press=PRESS,
        streamer=heard,
        max_new_tokens=4,
        return_stats=True,
        **options,
    )
    assert heard.tokens == [9, 8, 5, 6, *found["stats"].tokens[0], -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"questions": QUESTIONS}, "streamer: got 3 answers, wanted one"),
        ({"num_return_sequences": 2, "do_sample": True}, "streamer: got 2 answers, wanted one"),
        ({"num_beams": 2}, "beam search"),
    ],
)
def test_a_streamer_takes_one_answer(pipe, options, message):
    with pytest.raises(cp.CachepressError, match=message) as caught:
        pipe(CONTEXT, streamer=TextStreamer(pipe.tokenizer), press=PRESS, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_return_sequences": 0}, "num_return_sequences: got 0, wanted a whole number"),
        ({"num_return_sequences": "2"}, "num_return_sequences: got '2'"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences"),
        ({"output_scores": True}, "output_scores=True needs return_dict_in_generate"),
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
        ({"prompt_lookup_num_tokens": 3, "repetition_penalty": 2.0}, LOOKUP or "leave one of them"),
        (
            {"prompt_lookup_num_tokens": 3, "num_return_sequences": 2},
            LOOKUP or "num_return_sequences",
        ),
    ],
)
def test_what_transformers_refuses_is_one_line(pipe, options, message):
    with pytest.raises(cp.CachepressError, match=message) as caught:
        pipe(CONTEXT, question=QUESTIONS[0], press=PRESS, max_new_tokens=4, **options)
    assert "\n" not in str(caught.value)


def test_ask_takes_options_that_read_the_text_if_the_cache_knows_it():
    model, made = tiny(), tokenizer()
    ids = made(CONTEXT, return_tensors="pt", add_special_tokens=False).input_ids
    cache = cp.prefill(model, ids, PRESS)
    options = {"no_repeat_ngram_size": 1}
    answer = cp.ask(model, made, cache, "w9", max_new_tokens=8, generation=options)
    assert not set(answer.split()) & {*CONTEXT.split(), "w9"}
    pair = cp.prefill(model, torch.cat([ids, ids]), PRESS)
    pair.batch_select_indices(torch.tensor([0]))
    with pytest.raises(cp.CachepressError, match="reads the tokens of the text") as caught:
        cp.ask(model, made, pair, "w9", generation=options)
    assert "\n" not in str(caught.value)
    for several in ({"num_return_sequences": 2}, {"return_dict_in_generate": True}):
        with pytest.raises(cp.CachepressError, match="use the pipeline"):
            cp.ask(model, made, cache, "w9", generation=several)
