"""The loop that decodes beside transformers' own generate(): the same tokens, the same cache."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

import cachepress as cp
from cachepress.generation import decode as loop
from cachepress.hf import cache_argument
from tests.bounds import close
from tests.exact import doubled
from tests.pictures import qwen2_vl
from tests.tiny import ARCHITECTURES, exact_tiny, tokens
from tests.tiny_cache import forward, kept

RAGGED = cp.AdaKVPress(cp.KnormPress(0.5))
NO_END = [1000]
UNCROPPED = {"gemma2", "gemma3", "gpt_oss", "qwen3_next"}
pytestmark = pytest.mark.usefixtures("clear_answers")


def generated(model, cache, ids, mask=None, new=20, ends=NO_END, **options):
    """What generate() appends."""
    mask = torch.ones_like(ids) if mask is None else mask
    before = torch.ones(len(ids), cache.get_seq_length(), dtype=torch.long)
    out = model.generate(
        ids,
        attention_mask=torch.cat([before, mask], dim=1),
        max_new_tokens=new,
        eos_token_id=ends,
        **{"do_sample": False, "pad_token_id": 0, cache_argument(model): cache, **options},
    )
    return out[:, ids.shape[1] :]


def decoded(model, cache, ids, mask=None, new=20, ends=NO_END, **options):
    return cp.decode(
        model,
        cache,
        ids,
        new,
        attention_mask=mask,
        eos_token_id=ends,
        **{"pad_token_id": 0, **options},
    )


def same_cache(model, ours, wanted, padding=0):
    """Both hold the same, and so a further turn gets the same logits."""
    n = ours.get_seq_length()
    assert n == wanted.get_seq_length()
    assert kept(ours) == kept(wanted)
    mask = torch.ones(2, n + 3, dtype=torch.long)
    mask[1, 40 : 40 + padding] = 0
    turn = {"input_ids": tokens(3, batch=2, seed=5), "attention_mask": mask}
    turn["position_ids"] = (mask.cumsum(-1) - 1)[:, -3:]
    close(*(forward(model, cache, **turn).logits for cache in (ours, wanted)))


QUESTION = tokens(5, batch=2, seed=7)
PADDED = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@pytest.mark.parametrize("press", [None, RAGGED], ids=["whole", "ragged"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tokens_and_the_cache_are_those_of_generate(name, press):
    model = exact_tiny(name)
    cache = cp.prefill(model, tokens(40, batch=2), press)
    free = generated(model, cp.fork(cache), QUESTION, PADDED, new=40)
    # The second sequence ends at its 19th token, and the first one never does, or earlier.
    for ends in (NO_END, [int(free[1, 18])], free[:, 20].tolist()):
        theirs, ours = cp.fork(cache), cp.fork(cache)
        wanted = generated(model, theirs, QUESTION, PADDED, 40, ends)
        assert torch.equal(decoded(model, ours, QUESTION, PADDED, 40, ends), wanted)
        same_cache(model, ours, theirs, padding=2)


@pytest.mark.parametrize("new", [1, 2, 16, 17, 33])
@pytest.mark.parametrize("storage", ["full", cp.Codec(8, residual=4), cp.Codec(8, residual=0)])
def test_the_cache_ends_where_the_last_sequence_does(new, storage):
    model = exact_tiny()
    cache = cp.prefill(model, tokens(90, batch=2), RAGGED, storage=storage)
    free = generated(model, cp.fork(cache), QUESTION, new=new)
    end = [int(free[0, -1])]
    theirs, ours = cp.fork(cache), cp.fork(cache)
    wanted = generated(model, theirs, QUESTION, None, 50, end)
    assert torch.equal(decoded(model, ours, QUESTION, None, 50, end), wanted)
    same_cache(model, ours, theirs)


def test_padding_in_the_text_and_a_prompt_of_its_own():
    model, ids = exact_tiny(), tokens(20, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    wanted = generated(model, DynamicCache(), ids, mask)
    assert torch.equal(decoded(model, DynamicCache(), ids, mask), wanted)
    cache = cp.prefill(model, ids[:, :15], RAGGED, attention_mask=mask[:, :15])
    theirs = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cp.fork(cache),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=NO_END,
        pad_token_id=0,
    )
    assert torch.equal(decoded(model, cache, ids[:, 15:], mask), theirs[:, 20:])


def test_a_press_acts_on_the_prompt_and_on_what_is_decoded():
    model, ids = exact_tiny(), tokens(60, batch=2)
    press = cp.DecodingPress(cp.KnormPress(), compression_interval=7, target_size=20)
    end = [int(generated(model, DynamicCache(), ids, new=18)[0, -1])]
    found = []
    for answer in (generated, decoded):
        cache = DynamicCache()
        with press(model):
            found.append((answer(model, cache, ids, None, 40, end), kept(cache)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_pictures_shift_the_positions_of_what_follows():
    torch.manual_seed(0)
    model, inputs = qwen2_vl()
    model = doubled(model.eval())
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    cache = DynamicCache()
    with RAGGED(model):
        forward(model, cache, **inputs)
    question, other = tokens(3, seed=7), tokens(30)
    alone = cp.fork(cache)
    wanted, first = [], question
    shift = int(cache.rope_deltas)
    for _ in range(8):
        seen, n = alone.get_seq_length(), first.shape[1]
        at = torch.arange(seen, seen + n).expand(3, 1, n) + shift
        logits = forward(model, alone, input_ids=first, position_ids=at).logits
        first = logits[:, -1:].float().argmax(-1)
        wanted.append(int(first))
    assert shift < 0
    cp.prefill(model, other)  # Another text is read in between.
    assert decoded(model, cache, question, new=8).tolist() == [wanted]


def test_ends_and_padding_are_those_of_the_generation_config():
    model = exact_tiny()
    cache = cp.prefill(model, tokens(40, batch=2), RAGGED)
    free = decoded(model, cp.fork(cache), QUESTION, ends=[])
    assert free.shape == (2, 20)
    model.generation_config.eos_token_id = [int(free[0, 3]), 96]
    model.generation_config.pad_token_id = None
    found = cp.decode(model, cp.fork(cache), QUESTION, 20)
    assert found[0, :4].tolist() == free[0, :4].tolist()
    assert set(found[0, 4:].tolist()) == {int(free[0, 3])}
    model.generation_config.pad_token_id = 5
    found = cp.decode(model, cp.fork(cache), QUESTION, 20, eos_token_id=int(free[0, 3]))
    assert set(found[0, 4:].tolist()) == {5}


def test_processors_get_the_tokens_of_the_question_and_the_answer():
    model = exact_tiny()
    cache = cp.prefill(model, tokens(40, batch=2), RAGGED)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(5.0)])
    wanted = generated(model, cp.fork(cache), QUESTION, repetition_penalty=5.0)
    ours = decoded(model, cp.fork(cache), QUESTION, logits_processor=processors)
    assert torch.equal(ours, wanted)
    assert not torch.equal(ours, decoded(model, cache, QUESTION))


def test_sampling_repeats_with_its_seed_and_keeps_to_the_likely_tokens():
    model = exact_tiny()
    cache = cp.prefill(model, tokens(40, batch=2), RAGGED)

    def sampled(**options):
        return decoded(model, cp.fork(cache), QUESTION, do_sample=True, **options)

    greedy = decoded(model, cp.fork(cache), QUESTION)
    assert torch.equal(sampled(top_k=1), greedy)
    assert torch.equal(sampled(top_p=0.0), greedy)
    assert torch.equal(sampled(seed=1), sampled(seed=1))
    assert not torch.equal(sampled(seed=1), sampled(seed=2))
    torch.manual_seed(3)
    found = sampled(temperature=3.0, top_k=2, seed=1)
    torch.manual_seed(3)
    free = [sampled(), sampled()]
    torch.manual_seed(3)
    assert torch.equal(sampled(), free[0]) and not torch.equal(*free)
    text = torch.cat([QUESTION, found], dim=1)
    logits = forward(model, cp.fork(cache), input_ids=text).logits[:, 4:-1]
    likely = logits.topk(2, dim=-1).indices == found[:, :, None]
    assert likely.any(-1).all() and likely[..., 1].any()


def test_tokens_are_drawn_as_often_as_their_probability_says():
    p, n = torch.tensor([0.5, 0.3, 0.2, 0.0]), 20_000
    drawn = loop._drawn(p.log().expand(n, -1), torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=4).double()
    assert counts[3] == 0
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all()


class Streamer:
    def __init__(self, stop=1000):
        self.put_in, self.stop = [], stop

    def put(self, value):
        self.put_in.append(value.tolist())
        if len(self.put_in) > self.stop:
            raise KeyboardInterrupt

    def end(self):
        self.put_in.append("end")


@pytest.mark.parametrize("new", [1, 5, 16, 20, 40])
def test_a_streamer_gets_what_generate_gives_it(new):
    model = exact_tiny()
    cache = cp.prefill(model, tokens(40, batch=2), RAGGED)
    end = [int(generated(model, cp.fork(cache), QUESTION, new=20)[0, -1])]
    ours, theirs = Streamer(), Streamer()
    decoded(model, cp.fork(cache), QUESTION, None, new, end, streamer=ours)
    generated(model, cp.fork(cache), QUESTION, None, new, end, streamer=theirs)
    assert ours.put_in == theirs.put_in


@pytest.mark.parametrize("press", [None, RAGGED], ids=["whole", "ragged"])
@pytest.mark.parametrize("forwards", [1, 2, 20])
def test_an_interrupt_puts_the_cache_back(press, forwards):
    model = exact_tiny()
    cache = cp.prefill(model, tokens(40, batch=2), press)
    before, calls = kept(cache), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == forwards:
            raise KeyboardInterrupt

    wanted = decoded(model, cp.fork(cache), QUESTION)
    handle = model.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        decoded(model, cache, QUESTION)
    handle.remove()
    assert len(calls) == forwards
    assert {layer.get_seq_length() for layer in cache.layers} == {40}
    assert kept(cache) == before
    assert torch.equal(decoded(model, cache, QUESTION), wanted)


def test_a_streamer_that_stops_puts_the_cache_back():
    model = exact_tiny()
    cache = cp.prefill(model, tokens(40, batch=2), RAGGED)
    with pytest.raises(KeyboardInterrupt):
        decoded(model, cache, QUESTION, streamer=Streamer(stop=3))
    assert cache.get_seq_length() == 40


def test_an_interrupt_after_a_compression_is_what_is_raised():
    model, cache = exact_tiny(), DynamicCache()
    with RAGGED(model), pytest.raises(KeyboardInterrupt):
        decoded(model, cache, QUESTION, streamer=Streamer(stop=3))


@pytest.mark.parametrize("press", [None, RAGGED], ids=["whole", "ragged"])
@pytest.mark.parametrize("name", ["llama", *sorted(UNCROPPED)])
def test_caches_that_cannot_forget_are_asked_after_every_token(name, press, monkeypatch):
    lots, real = [], loop._Forwards.lot
    monkeypatch.setattr(loop._Forwards, "lot", lambda self: lots.append(real(self)) or lots[-1])
    model = exact_tiny(name)
    decoded(model, cp.prefill(model, tokens(40, batch=2), press), QUESTION, new=3)
    with RAGGED(model):
        decoded(model, DynamicCache(), QUESTION, new=3)
    assert lots == [1 if name in UNCROPPED else 16, 1]


@pytest.mark.parametrize("mask", [None, PADDED], ids=["even", "padded"])
def test_recorded_steps_are_replayed_turn_after_turn(mask, replays):
    """Tokens beyond an end were appended by replays, and are not there in the next turn."""
    model = exact_tiny()
    cache = cp.prefill(model, tokens(40, batch=2), RAGGED)
    cp.configure(recorded=False)
    free = generated(model, cp.fork(cache), QUESTION, mask)
    end, found = [int(free[0, 8]), int(free[1, 6])], []
    for recorded in (False, True):
        cp.configure(recorded=recorded)
        held, before = cp.fork(cache), len(replays)
        first = decoded(model, held, QUESTION, mask, ends=end)
        whole = torch.ones(2, held.get_seq_length() + 5, dtype=torch.long)
        whole[:, 40:45] = 1 if mask is None else mask
        found.append([first, decoded(model, held, QUESTION, whole)])
        assert held.get_seq_length() == 40 + 5 + first.shape[1] - 1 + 5 + 19
    assert first.shape[1] < 16
    assert all(map(torch.equal, *found))
    # Of the 15 steps after each question three of the first run as they are, and one is recorded.
    assert len(replays) - before == 15 - 4 + 19


MODEL = exact_tiny()
WRONG = {
    "no tokens are wanted": ({"new": 0}, "max_new_tokens: got 0, wanted a whole number"),
    "no tokens are given": ({"ids": tokens(5)[:, :0]}, r"input_ids: got shape \(1, 0\)"),
    "words": ({"ids": "words"}, "input_ids: got 'words', wanted token ids"),
    "embeddings": ({"ids": torch.zeros(1, 5)}, "torch.float32, wanted token ids"),
    "one dimension": ({"ids": tokens(5)[0]}, r"input_ids: got shape \(5,\)"),
    "above the vocabulary": ({"ids": torch.tensor([[5, 97]])}, "from 5 to 97, wanted .* 0 to 96"),
    "below the vocabulary": ({"ids": torch.tensor([[-1, 9]])}, "from -1 to 9, wanted .* 0 to 96"),
    "another batch": ({"ids": tokens(5, batch=3)}, "holds 1 sequences and input_ids has 3"),
    "no cache": ({"cache": None}, "cache: got None, wanted"),
    "a short mask": ({"mask": torch.ones(1, 3)}, r"got \(1, 3\), wanted \(1, 5\) .* \(1, 45\)"),
    "padding on the right": ({"mask": torch.tensor([[1, 1, 1, 1, 0]])}, "padding on the right"),
    "greedy with options": ({"top_k": 5}, "are for sampling: give do_sample=True"),
    "no temperature": ({"do_sample": True, "temperature": 0.0}, "sampling: `temperature`"),
    "top_k of nothing": ({"do_sample": True, "top_k": 0}, "sampling: `top_k` has to be"),
    "top_p above 1": ({"do_sample": True, "top_p": 1.5}, "sampling: `top_p` has to be"),
    "a seed in words": ({"do_sample": True, "seed": "x"}, "seed: got 'x', wanted"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_a_line(name):
    given, message = WRONG[name]
    cache = cp.prefill(MODEL, tokens(40), RAGGED)
    with pytest.raises(cp.CachepressError, match=message) as caught:
        decoded(MODEL, **{"cache": cache, "ids": tokens(5), **given})
    assert "\n" not in str(caught.value)
    assert cache.get_seq_length() == 40


def test_learned_positions_end():
    model = exact_tiny("gpt2")
    cache = cp.prefill(model, tokens(500), RAGGED)
    assert decoded(model, cp.fork(cache), tokens(5), new=8).shape == (1, 8)
    with pytest.raises(cp.CachepressError, match="no room: 500 tokens .*, 5 of .* 9 new"):
        decoded(model, cache, tokens(5), new=9)
