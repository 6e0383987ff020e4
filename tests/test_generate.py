"""transformers' own generate() on compressed caches."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StaticCache
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from tests.bounds import close
from tests.tiny import ARCHITECTURES, exact_tiny, tokenizer, tokens, words
from tests.tiny_cache import forward, kept, pressed

PRESS = cp.KnormPress(0.5)
pytestmark = pytest.mark.usefixtures("clear_answers")
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def by_hand(model, cache, token, n):
    """Greedy decoding, one forward per token, positions given by hand."""
    out = []
    for _ in range(n):
        position = torch.tensor([[cache.get_seq_length()]])
        logits = forward(model, cache, input_ids=token, position_ids=position).logits
        token = logits[:, -1:].argmax(-1)
        out.append(token.item())
    return out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_continues_from_the_full_text_and_from_new_ids(name):
    model, ids, question = exact_tiny(name), tokens(30), tokens(3, seed=7)
    expected = pressed(model, PRESS, ids)
    forward(model, expected, input_ids=question[:, :-1])
    wanted = by_hand(model, expected, question[:, -1:], 8)
    with torch.no_grad():
        full = torch.cat([ids, question], dim=-1)
        a = model.generate(full, past_key_values=pressed(model, PRESS, ids), **OPTIONS)
        b = model.generate(
            question,
            attention_mask=torch.ones(1, 33, dtype=torch.long),
            past_key_values=pressed(model, PRESS, ids),
            **OPTIONS,
        )
    assert a[0, 33:].tolist() == wanted
    assert b[0, 3:].tolist() == wanted


def test_the_prompt_is_compressed_once():
    model, ids = exact_tiny(), tokens(30)
    with torch.no_grad(), PRESS(model):
        out = model.generate(ids, return_dict_in_generate=True, **OPTIONS)
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    assert compressed_layers(cache)[0].lengths.tolist() == [[15 + 7, 15 + 7]]
    assert kept(cache)[0][0][0][-7:] == list(range(30, 37))
    assert out.sequences[0, 30:].tolist()[1:] == by_hand(
        model, pressed(model, PRESS, ids), out.sequences[:, 30:31], 7
    )


def test_sampling_repeats_with_its_seed():
    model, ids = exact_tiny(), tokens(30)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.no_grad(), PRESS(model):
            runs.append(model.generate(ids, **{**OPTIONS, "do_sample": True, "top_k": 20}))
    assert torch.equal(*runs)
    assert runs[0].shape == (1, 38)


def test_beams_follow_their_pairs():
    model, ids = exact_tiny(), tokens(30)
    with torch.no_grad():
        plain = model.generate(ids, num_beams=3, **OPTIONS)
        with cp.KnormPress(0.0)(model):
            same = model.generate(ids, num_beams=3, **OPTIONS)
        with PRESS(model):
            ours = model.generate(ids, num_beams=3, **OPTIONS)
    assert torch.equal(same, plain)
    assert ours.shape == (1, 38)


def test_a_padded_batch_generates_like_each_sequence_alone():
    model, short, long = exact_tiny(), tokens(12, seed=1), tokens(20, seed=2)
    ids = torch.cat([torch.cat([torch.zeros(1, 8, dtype=torch.long), short], -1), long])
    with torch.no_grad(), PRESS(model):
        both = model.generate(ids, attention_mask=(ids > 0).long(), **OPTIONS)
        one = model.generate(short, **OPTIONS)
        two = model.generate(long, **OPTIONS)
    assert both[0, 20:].tolist() == one[0, 12:].tolist()
    assert both[1, 20:].tolist() == two[0, 20:].tolist()


def test_appending_does_not_copy_the_cache():
    model = exact_tiny()
    cache = pressed(model, PRESS, tokens(30))
    store = compressed_layers(cache)[0]
    forward(model, cache, input_ids=tokens(1))
    before = [x.data_ptr() for x in store.tensors()]
    for step in range(60):
        forward(model, cache, input_ids=tokens(1, seed=step))
    assert [x.data_ptr() for x in store.tensors()] == before
    assert store.keys.shape[2] == 76


def test_crop_undoes_decoding_but_not_the_compression():
    model, ids = exact_tiny(), tokens(30)
    cache = pressed(model, PRESS, ids)
    once = forward(model, cache, input_ids=tokens(4)).logits
    cache.crop(-4)
    assert cache.get_seq_length() == 30
    assert torch.equal(forward(model, cache, input_ids=tokens(4)).logits, once)
    with pytest.raises(cp.CachepressError, match="cannot crop a compressed cache to 29"):
        cache.crop(-5)


def test_reset_makes_a_cache_new():
    model, ids = exact_tiny(), tokens(30)
    cache = pressed(model, PRESS, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    with PRESS(model):
        forward(model, cache, input_ids=ids)
    assert kept(cache) == kept(pressed(model, PRESS, ids))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fork_as_a_batch_decodes_like_the_original(name):
    model, ids, step = exact_tiny(name), tokens(30), tokens(2, seed=3)
    cache = pressed(model, PRESS, ids)
    forked = cp.fork(cache, 3)
    batch = forward(model, forked, input_ids=step.expand(3, -1)).logits
    assert cache.get_seq_length() == 30
    alone = forward(model, cache, input_ids=step).logits
    for row in batch:
        close(row, alone[0])


def test_a_fork_needs_a_number():
    with pytest.raises(cp.CachepressError, match="fork: n: got 0, wanted"):
        cp.fork(DynamicCache(), 0)


RAGGED = cp.AdaKVPress(cp.KnormPress(0.5))


def answer(model, cache, question, **options):
    """What generate() appends to a question on a cache."""
    mask = torch.ones(len(question), cache.get_seq_length() + question.shape[1])
    with torch.no_grad():
        out = model.generate(
            question, attention_mask=mask, past_key_values=cache, **{**OPTIONS, **options}
        )
    return out[:, question.shape[1] :]


@pytest.mark.parametrize("press", [PRESS, RAGGED], ids=["dense", "ragged"])
@pytest.mark.parametrize("storage", ["full", cp.Codec(8, residual=4)], ids=["full", "int8"])
def test_a_cache_of_one_expands_itself_for_beams_and_sequences(press, storage):
    model, question = exact_tiny(), tokens(3, seed=7)
    cache = cp.prefill(model, tokens(60), press, storage=storage)
    beams = answer(model, cp.fork(cache), question, num_beams=3, num_return_sequences=3)
    wanted = answer(model, cp.fork(cache, 3), question.expand(3, -1)[:1], num_beams=3)
    assert torch.equal(beams[:1], wanted)
    assert len({tuple(row.tolist()) for row in beams}) == 3
    torch.manual_seed(0)
    sampled = answer(model, cp.fork(cache), question, do_sample=True, num_return_sequences=4)
    assert len({tuple(row.tolist()) for row in sampled}) > 1
    greedy = answer(model, cp.fork(cache), question)
    assert torch.equal(answer(model, cp.fork(cache), question.expand(2, -1)), greedy.expand(2, -1))


def test_beams_on_ragged_heads_are_those_of_a_search_by_hand():
    """The best of all continuations of two tokens, found by trying each."""
    model, ids, question = exact_tiny(), tokens(60), tokens(3, seed=7)
    cache = cp.prefill(model, ids, RAGGED)
    found = answer(model, cp.fork(cache), question, num_beams=97, max_new_tokens=2)
    first = cp.fork(cache)
    scores = forward(model, first, input_ids=question).logits[:, -1].log_softmax(-1)
    first.reorder_cache(torch.zeros(97, dtype=torch.long))
    second = forward(model, first, input_ids=torch.arange(97)[:, None]).logits[:, -1]
    total = scores.T + second.log_softmax(-1)
    assert found[0].tolist() == [int(total.argmax()) // 97, int(total.argmax()) % 97]


def test_another_number_of_sequences_is_refused():
    model = exact_tiny()
    cache = cp.fork(cp.prefill(model, tokens(30), PRESS), 2)
    with pytest.raises(cp.CachepressError, match="holds 2 sequences and the forward has 3"):
        forward(model, cache, input_ids=tokens(1, batch=3))


def test_streaming_hands_out_every_token():
    model, question = exact_tiny(), tokens(3, seed=7)
    cache = cp.prefill(model, tokens(60), RAGGED)

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    streamer = Streamer()
    out = answer(model, cp.fork(cache), question, streamer=streamer)
    assert streamer.tokens == [*question[0].tolist(), *out[0].tolist(), "end"]


@pytest.mark.parametrize("press", [PRESS, RAGGED], ids=["dense", "ragged"])
@pytest.mark.parametrize(
    "how", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": exact_tiny()}]
)
def test_assisted_decoding_gives_the_greedy_tokens_or_is_refused(press, how):
    """Older versions of transformers crop by the length of the new ids, which is refused."""
    model, question = exact_tiny(), tokens(3, seed=7)
    cache = cp.prefill(model, tokens(60), press)
    options = {"max_new_tokens": 20, "eos_token_id": 96}
    greedy = answer(model, cp.fork(cache), question, **options)
    if Version(transformers.__version__) < Version("5.20"):
        with pytest.raises(cp.CachepressError, match="cannot crop a compressed cache to"):
            answer(model, cp.fork(cache), question, **options, **how)
        return
    assisted = answer(model, cp.fork(cache), question, **options, **how)
    assert torch.equal(assisted, greedy)


def test_assisted_decoding_inside_the_context_is_refused():
    model = exact_tiny()
    options = {**OPTIONS, "max_new_tokens": 30, "eos_token_id": 96}
    with (
        torch.no_grad(),
        RAGGED(model),
        pytest.raises(cp.CachepressError, match="do assisted decoding after"),
    ):
        model.generate(tokens(60), prompt_lookup_num_tokens=5, **options)


def test_crop_on_ragged_heads_and_across_a_fork():
    model, ids = exact_tiny(), tokens(60)
    cache = cp.prefill(model, ids, RAGGED)
    longer = tokens(80, seed=3)
    wanted = forward(model, cp.fork(cache), input_ids=longer[:, :50]).logits[:, -1]
    forward(model, cache, input_ids=longer)
    forked = cp.fork(cache)
    forked.crop(-30)
    assert forked.get_seq_length() == 110
    assert cache.get_seq_length() == 140
    forked.crop(-1)
    again = forward(model, forked, input_ids=longer[:, 49:50]).logits[:, -1]
    close(again, wanted)


@pytest.mark.parametrize("how", ["function", "in place"])
def test_a_compiled_model_gives_the_same_logits_and_is_compressed(how):
    model, ids, question = exact_tiny(), tokens(60), tokens(4, seed=3)
    cache = cp.prefill(model, ids, RAGGED)
    wanted = [forward(model, cp.fork(cache), input_ids=question[:, :n]).logits for n in (1, 4)]
    if how == "in place":
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for n, logits in zip((1, 4), wanted, strict=True):
            ours = compiled(question[:, :n], past_key_values=cp.fork(cache)).logits
            close(ours, logits)
        fresh = DynamicCache()
        with RAGGED(model):
            compiled(ids, past_key_values=fresh)
    assert kept(fresh) == kept(cache)


def test_eight_questions_hold_the_context_once():
    model = exact_tiny()
    cache = cp.prefill(model, tokens(400), RAGGED)
    forked = cp.fork(cache, 8)
    one, eight = cp.size_of(cache).bytes_after, cp.size_of(forked).bytes_after
    assert eight == one
    forward(model, forked, input_ids=tokens(5, batch=8))
    row = 2 * 8 * 8
    assert cp.size_of(forked).bytes_after == one + 4 * 2 * 8 * 5 * row
    storages = {x.data_ptr() for store in compressed_layers(cache) for x in store.tensors()}
    shared = {
        x.data_ptr() for store in compressed_layers(forked) for x in store.tensors()
    } & storages
    assert shared == storages


def test_a_fork_of_an_uncompressed_cache_shares_its_pairs_too():
    model = exact_tiny()
    cache = cp.prefill(model, tokens(400), cp.KnormPress(0.0))
    forked = cp.fork(cache, 8)
    step = tokens(2, seed=3)
    forward(model, forked, input_ids=step.expand(8, -1))
    wanted = forward(model, cp.prefill(model, tokens(400)), input_ids=step).logits
    ours = forward(model, cache, input_ids=step).logits
    close(ours, wanted)
    tails = 8 * 4 * 2 * (2 + 64) * 2 * 8 * 8
    assert cp.size_of(forked).bytes_after < 4 * 2 * (400 + 32) * (2 * 8 * 8 + 4) + tails


KINDS = [*ALL_CACHE_IMPLEMENTATIONS, "paged"]
"""Every kind of cache that a model's own generation config can ask for."""


def asking_for(kind, name="llama"):
    model = exact_tiny(name)
    model.generation_config.cache_implementation = kind
    return model


def answers(model, ids):
    """Answers under a press: with no cache of the caller's, with one, after it, and in words."""
    with torch.no_grad(), PRESS(model):
        alone = model.generate(ids, **OPTIONS)[0].tolist()
        given = model.generate(ids, past_key_values=DynamicCache(), **OPTIONS)[0].tolist()
    with torch.no_grad():
        cache, mask = cp.prefill(model, ids, PRESS), torch.ones(1, 33, dtype=torch.long)
        options = {**OPTIONS, "attention_mask": mask, "cache_implementation": None}
        later = model.generate(tokens(3), past_key_values=cache, **options)[0].tolist()
    said = cp.ask(model, tokenizer(), cp.prefill(model, ids, PRESS), "w5 w6", max_new_tokens=4)
    pipe = transformers.pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer())
    asked = {"question": "w5 w6", "max_new_tokens": 4}
    told = [pipe(words(30), press=press, **asked)["answer"] for press in (PRESS, None)]
    return [alone, given, later, said, told]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_model_that_asks_for_another_kind_of_cache_answers_as_ever(name):
    ids = tokens(30)
    wanted = answers(asking_for(None, name), ids)
    assert wanted[0] == wanted[1]
    for kind in KINDS:
        model = asking_for(kind, name)
        assert answers(model, ids) == wanted
        assert model.generation_config.cache_implementation == kind


def test_what_a_model_asks_for_comes_back_with_the_last_block():
    model, ids = asking_for("static"), tokens(30)
    first, second = PRESS(model), cp.SnapKVPress(0.5, window_size=4)(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.generation_config.cache_implementation is None
    second.__exit__(None, None, None)
    assert model.generation_config.cache_implementation == "static"
    with pytest.raises(RuntimeError, match="stop"), PRESS(model):
        raise RuntimeError("stop")
    assert model.generation_config.cache_implementation == "static"
    with torch.no_grad():
        plain = model.generate(ids, return_dict_in_generate=True, **OPTIONS)
    assert type(plain.get("cache", plain.get("past_key_values"))) is StaticCache
    with torch.no_grad(), PRESS(model), pytest.raises(cp.CachepressError, match="got StaticCache"):
        model.generate(ids, cache_implementation="static", **OPTIONS)
